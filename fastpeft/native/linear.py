"""Packed layers between rows that lie one after another, where no LayerNorm is to be folded.

    y = [x +] [A] (a W'^T + b' + low-rank terms)

With A the layer is followed by a serial adapter. Kept for the backward pass are a, where factors read it, and what the
adapter keeps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpeft.native import blocked, low_rank
from fastpeft.native.bottleneck import Adapter, Bottleneck
from fastpeft.native.gemm import gemm
from fastpeft.native.low_rank import LowRank, Place
from fastpeft.native.memory import pool
from fastpeft.native.packs import Layer
from fastpeft.ops.autocast import without_autocast


@dataclass(frozen=True)
class Linear:
    """A frozen layer.

    Attributes:
        layer: packed.
        places: of its low-rank terms.
        adapter: a serial adapter behind it, or None.
        start: the outputs from this one on, a multiple of 32, are all that is wanted; only without terms and adapter.
    """

    layer: Layer
    places: tuple[Place, ...] = ()
    adapter: Adapter | None = None
    start: int = 0


def linear(a: Tensor, x: Tensor | None, plan: Linear, factors: Sequence[Tensor | None]) -> Tensor:
    """The layer's output, differentiable in a, x and the factors.

    Args:
        a: (..., in), bf16.
        x: (..., out), bf16 or fp32, added; or None.
        plan: everything that is frozen.
        factors: A (r, in) and B (out, r) of every low-rank term, in the order of the plan's places; then the adapter's
            W_down, b_down or None, W_up, b_up or None.

    Returns:
        (..., out), of x's dtype; bf16 without x.
    """
    return _Linear.apply(a, x, plan, *factors)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, x: Tensor | None, plan: Linear, *factors: Tensor):
        flat = a.reshape(-1, a.shape[-1]).contiguous()
        rows = flat.shape[0]
        terms, adapter = _split(plan, factors)
        low = LowRank(plan.layer, terms, plan.places) if terms else None
        out = plan.layer.weight.shape[0] - plan.start
        other = None if x is None else x.reshape(rows, out).contiguous()
        # A residual stream in fp32 stays one: its sum is not rounded to the products' format.
        y = pool.empty(rows, out, dtype=torch.bfloat16 if other is None else other.dtype)
        u, kept = None, (None, None, None)
        if adapter:
            f = blocked.empty(rows, out)
            u = low_rank.forward(plan.layer, low, flat, f, rows)
            bottleneck = Bottleneck(plan.adapter, adapter, plan.layer)
            kept = (*bottleneck.behind(f, other, y, rows, any(ctx.needs_input_grad)), f)
        elif plan.start:
            weight, bias, _ = plan.layer.tail(plan.start)
            gemm(flat, weight, y, rows, bias, other=other)
        else:
            u = low_rank.forward(plan.layer, low, flat, y, rows, other=other)
        ctx.save_for_backward(flat if terms else None, u, *kept, *factors)
        ctx.plan, ctx.shape = plan, a.shape
        return y.view(*a.shape[:-1], out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx, dy: Tensor):
        plan = ctx.plan
        a, u, hidden, slopes, f, *factors = ctx.saved_tensors
        needs_a, needs_x, _, *needed = ctx.needs_input_grad
        terms, adapter = _split(plan, factors)
        needs_terms, needs_adapter = _split(plan, needed)
        flat = dy.reshape(-1, dy.shape[-1]).contiguous()
        rows = flat.shape[0]
        dx = dy if needs_x else None
        df, dadapter = flat, []
        if adapter:
            before = needs_a or any(map(any, needs_terms))
            bottleneck = Bottleneck(plan.adapter, adapter, plan.layer)
            _, df, dadapter = bottleneck.backward(flat, f, hidden, slopes, rows, None, needs_adapter, before)
        da, dterms = None, []
        if df is not None and (needs_a or terms):
            da = pool.empty(rows, ctx.shape[-1], dtype=torch.bfloat16) if needs_a else None
            if plan.start:
                gemm(df, plan.layer.tail(plan.start)[2], da, rows)
            else:
                low = LowRank(plan.layer, terms, plan.places) if terms else None
                du = low_rank.backward(plan.layer, low, df, da, rows)
                if low is not None:
                    dterms = low.gradients(a, u, df, du, rows, None, needs_terms)
        elif terms:
            dterms = [None] * (2 * len(terms))
        return None if da is None else da.view(ctx.shape), dx, None, *dterms, *dadapter


def _split(plan: Linear, factors: Sequence) -> tuple[list[tuple], Sequence]:
    """Those of the terms in pairs, and the adapter's."""
    count = 2 * len(plan.places)
    pairs = list(zip(factors[:count:2], factors[1:count:2], strict=True))
    return pairs, factors[count:] if plan.adapter else ()


def bottleneck(x: Tensor, other: Tensor | None, plan: Adapter, skip: bool, factors: Sequence[Tensor | None]) -> Tensor:
    """An adapter alone, y = other + [x +] A(x), differentiable in x, other and the factors.

    Args:
        x: (..., d), bf16.
        other: like x, or None.
        plan: the adapter; its mode is not looked at.
        skip: x is added as well.
        factors: W_down (hidden, d), b_down (hidden,) or None, W_up (d, hidden), b_up (d,) or None.

    Returns:
        Like x.
    """
    return _Alone.apply(x, other, plan, skip, *factors)


class _Nothing:
    """The layer before an adapter that reads its rows as they are."""

    column_scale = shift = None


class _Alone(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, other: Tensor | None, plan: Adapter, skip: bool, *factors: Tensor):
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        rows, width = flat.shape
        beside = None if other is None else other.reshape(rows, width).contiguous()
        adapter = Bottleneck(plan._replace(mode="serial"), factors, _Nothing)
        y = pool.empty(rows, width, dtype=torch.bfloat16)
        keep = any(ctx.needs_input_grad)
        if skip:
            read = blocked.from_rows(flat)
            hidden, slopes = adapter.behind(read, beside, y, rows, keep)
        else:
            read = flat
            hidden, slopes, options = adapter.beside(rows, keep)
            bias = {"bias": options["down_bias"], "activation": plan.activation, "kept": slopes}
            gemm(flat, options["down"], hidden, rows, **bias)
            gemm(hidden, adapter.up(), y, rows, adapter.up_bias(), other=beside)
        ctx.save_for_backward(read, hidden, slopes, *factors)
        ctx.plan, ctx.skip, ctx.shape = plan, skip, x.shape
        return y.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx, dy: Tensor):
        read, hidden, slopes, *factors = ctx.saved_tensors
        needs_x, needs_other, _, _, *needed = ctx.needs_input_grad
        flat = dy.reshape(-1, dy.shape[-1]).contiguous()
        rows = flat.shape[0]
        adapter = Bottleneck(ctx.plan._replace(mode="serial"), factors, _Nothing)
        dz, df, found = adapter.backward(flat, read, hidden, slopes, rows, None, needed, needs_x and ctx.skip)
        dx = None
        if needs_x and ctx.skip:
            dx = blocked.to_rows(df, rows).view(ctx.shape)
        elif needs_x:
            dx = pool.empty(*flat.shape, dtype=torch.bfloat16)
            gemm(dz, adapter.backward_input(), dx, rows)
            dx = dx.view(ctx.shape)
        return dx, dy if needs_other else None, None, None, *found
