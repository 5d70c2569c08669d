"""Multi-head self-attention, written out so that low-rank terms and learned keys and values can enter it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.literal.lora import project, with_term


def attention(
    attn: nn.Module,
    x: Tensor,
    *,
    lora: nn.ModuleDict | None = None,
    prefix: nn.Module | None = None,
    mask: Callable[[str, Tensor], Tensor] | None = None,
) -> Tensor:
    """Compute Attention(x) = softmax(q k^T / sqrt(head width)) v, projected, for all rows of x.

    With a prefix of keys and values, k becomes [P_k; k] and v becomes [P_v; v] (Li & Liang 2021, section 4.1, seen from
    the attention layer). The prefix is used as it is: no projection and no key normalisation on it.

    Args:
        attn: timm's `Attention`.
        x: Rows after the block's first LayerNorm, (batch, rows, width).
        lora: Low-rank terms of this block by role.
        prefix: Learned keys and values of this block.
        mask: Replacement of LoRA's random dropout.
    """
    batch, rows, _ = x.shape
    width = attn.num_heads * attn.head_dim
    parts = project(attn.qkv, x, "qkv", lora, mask).split(width, dim=-1)
    q, k, v = (with_term(part, x, role, lora, mask) for role, part in zip("qkv", parts, strict=True))

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(-1, (attn.num_heads, attn.head_dim)).transpose(-3, -2)

    q, k, v = attn.q_norm(heads(q)), attn.k_norm(heads(k)), heads(v)
    learned = prefix.keys_and_values() if prefix is not None else None
    if learned is not None:
        prefix_k, prefix_v = (heads(t).to(x.dtype).expand(batch, -1, -1, -1) for t in learned)
        k, v = torch.cat([prefix_k, k], dim=2), torch.cat([prefix_v, v], dim=2)

    if attn.fused_attn:  # the model's own choice of kernel, so that a benchmark sees what users of the model run
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=attn.attn_drop.p if attn.training else 0.0)
    else:
        out = attn.attn_drop((q * attn.scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
    out = attn.norm(out.transpose(1, 2).reshape(batch, rows, width))
    if attn.gate is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj_drop(project(attn.proj, out, "o", lora, mask))
