"""bf16 attention on a CPU whose backward pass is matrix products, which run on the matrix units.

P = softmax(scale q k^T),  dv = P^T dy,  dP = dy v^T,  dS = P * (dP - sum(P * dP)),
dq = scale dS k,  dk = scale dS^T q
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft._native import cpu_features

# Up to this many keys the backward pass written in products is the faster one: bench/results, part prompt_attention.
_MOST_KEYS = 640
# Scores of one turn of its loop: they stay in a core's cache.
_SCORES = 1 << 19


def recomputes(q: Tensor, k: Tensor, v: Tensor) -> bool:
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


class Recomputed(torch.autograd.Function):
    """Attention that keeps q, k, v and computes its probabilities again in the backward pass."""

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
