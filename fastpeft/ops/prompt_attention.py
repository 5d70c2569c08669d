"""Attention whose keys and values are tokens and prompts.

    out = softmax(scale * q [k; k_p]^T + mask) [v; v_p]

Prompts are keys and values only. Their queries would produce rows that nobody reads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None = None,
    prompt_v: Tensor | None = None,
    attn_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention over tokens and prompts.

    Args:
        q: (B, H, Nq, D).
        k: (B, H, N, D), any strides.
        v: like k.
        prompt_k: (H, p, D) shared by the batch, (B, H, p, D), or None.
        prompt_v: like prompt_k.
        attn_mask: broadcastable to (B, H, Nq, N), boolean (True: may attend) or additive; every query sees the prompts.
        causal: token i sees tokens 0..i and every prompt; not together with attn_mask.
        scale: of the logits; D ** -0.5 if None.
        dropout: probability on the attention weights.

    Returns:
        (B, H, Nq, D).
    """
    if prompt_k is not None and prompt_k.shape[-2] > 0:
        length = prompt_k.shape[-2]
        if causal:
            attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
            causal = False
        if attn_mask is not None:
            attn_mask = F.pad(attn_mask, (0, length), value=True if attn_mask.dtype == torch.bool else 0.0)
        k = torch.cat((k, prompt_k.expand(k.shape[0], -1, -1, -1)), dim=2)
        v = torch.cat((v, prompt_v.expand(v.shape[0], -1, -1, -1)), dim=2)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, is_causal=causal, scale=scale, dropout_p=dropout
    )
