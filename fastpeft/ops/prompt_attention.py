"""Attention whose keys and values are tokens and prompts.

    out = softmax(scale * q [k; k_p]^T + mask) [v; v_p]

Prompts are keys and values only. Their queries would produce rows that nobody reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft._native import cpu_features


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
    if attn_mask is None and not causal and not dropout and _recomputes(q, k, v):
        return _Recomputed.apply(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, is_causal=causal, scale=scale, dropout_p=dropout
    )


# Up to this many keys the backward pass written in products is the faster one: bench/results, part prompt_attention.
_MOST_KEYS = 640
# Scores of one turn of its loop: they stay in a core's cache.
_SCORES = 1 << 19


def _recomputes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether torch would run its CPU flash attention for bf16, whose backward does not use the matrix units."""
    return (
        q.device.type == "cpu"
        and q.dtype == k.dtype == v.dtype == torch.bfloat16
        and k.shape[-2] <= _MOST_KEYS
        and torch.is_grad_enabled()
        and (q.requires_grad or k.requires_grad or v.requires_grad)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not cpu_features().isdisjoint({"amx_bf16", "avx512_bf16"})
    )


class _Recomputed(torch.autograd.Function):
    """Attention that keeps q, k, v and computes its probabilities again in the backward pass.

    P = softmax(scale q k^T),  dv = P^T dy,  dP = dy v^T,  dS = P * (dP - sum(P * dP)),
    dq = scale dS k,  dk = scale dS^T q
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        with torch.autocast("cpu", enabled=False):
            return (*_gradients(*ctx.saved_tensors, dy, ctx.scale, ctx.needs_input_grad), None)


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, dy: Tensor, scale: float, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dq, dk and dv, or None for those that nobody needs."""
    needs_q, needs_k, needs_v, _ = needs
    # Rows of a gradient lie as those of its input do before the heads are split, so that merging them is a view.
    dq, dk, dv = (_like(t) if need else None for t, need in ((q, needs_q), (k, needs_k), (v, needs_v)))
    step = max(1, _SCORES // max(1, q.shape[1] * q.shape[2] * k.shape[2]))
    for first in range(0, q.shape[0], step):
        part = slice(first, first + step)
        qs, ks, vs, dys = q[part] * scale, k[part], v[part], dy[part]
        p = torch.softmax(qs @ ks.transpose(-1, -2), dim=-1)
        if needs_v:
            dv[part] = p.transpose(-1, -2) @ dys
        if needs_q or needs_k:
            ds = torch._softmax_backward_data(dys @ vs.transpose(-1, -2), p, -1, p.dtype)
            if needs_q:
                dq[part] = (ds @ ks).mul_(scale)
            if needs_k:
                dk[part] = ds.transpose(-1, -2) @ qs
    return dq, dk, dv


def _like(t: Tensor) -> Tensor:
    batch, heads, rows, dim = t.shape
    return t.new_empty(batch, rows, heads, dim).transpose(1, 2)
