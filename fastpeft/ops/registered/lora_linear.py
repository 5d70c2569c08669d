"""`fastpeft::lora_linear` and its backward operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpeft.ops.choose import choose
from fastpeft.ops.registered.common import as_rows, gathered, nothing


@torch.library.custom_op("fastpeft::lora_linear", mutates_args=())
def _lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Sequence[Tensor],
    scales: Sequence[float],
    starts: Sequence[int],
    stops: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The layer's output (..., out), and x A^T of all terms side by side."""
    from fastpeft.ops import lora_linear as operator

    terms = operator.terms_from(factors, scales, starts, stops)
    rows = x.flatten(0, -2)
    module = choose(
        "lora_linear", backend, x.device, lambda module: module.reasons(rows, weight, bias, operator.plain(terms))
    )
    if module is not None:
        y, h = module.forward(rows, weight, bias, operator.plain(terms))
        return y.view(*x.shape[:-1], y.shape[1]), h
    y = operator.reference(x, weight, bias, terms, [weight.shape[0]])[0]
    return y, x.new_zeros(rows.shape[0], sum(a.shape[0] for a in factors[::2]))


@_lora_linear.register_fake
def _(x, weight, bias, factors, scales, starts, stops, backend):
    rows = x.shape[:-1].numel()
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(rows, sum(a.shape[0] for a in factors[::2]))


@torch.library.custom_op("fastpeft::lora_linear_backward", mutates_args=())
def _lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    h: Tensor,
    factors: Sequence[Tensor],
    scales: Sequence[float],
    starts: Sequence[int],
    stops: Sequence[int],
    needs_x: bool,
    needs_factors: bool,
    backend: str,
) -> list[Tensor]:
    """Gradients of x and of each factor; empty where not needed."""
    from fastpeft.ops import lora_linear as operator

    terms = operator.terms_from(factors, scales, starts, stops)
    rows = x.flatten(0, -2)
    module = choose(
        "lora_linear", backend, x.device, lambda module: module.reasons(rows, weight, None, operator.plain(terms))
    )
    needs = [needs_x] + [needs_factors] * len(factors)
    if module is not None:
        dx, pairs = module.backward(
            dy.flatten(0, -2), rows, weight, operator.plain(terms), h, needs_x=needs_x, needs_factors=needs_factors
        )
        flat = [None] * len(factors) if pairs is None else [gradient for pair in pairs for gradient in pair]
        return gathered([None if dx is None else dx.view(x.shape), *flat], [x, *factors], needs, dy)
    return gathered(_reference_gradients(dy, x, weight, terms), [x, *factors], needs, dy)


def _reference_gradients(dy, x, weight, terms):
    """g = scale dy B,  dx = dy W + g A,  dA = g^T x,  dB = scale dy^T (x A^T), with dy in each term's columns."""
    rows, dy_rows = as_rows(x), as_rows(dy)
    dx = dy_rows @ weight
    pairs = []
    for term in terms:
        a, b = term.a.to(x.dtype), term.b.to(x.dtype)
        part = term.scale * dy_rows[:, term.start : term.stop]
        g = part @ b
        dx = dx + g @ a
        pairs += [g.t() @ rows, part.t() @ (rows @ a.t())]
    return [dx.view(x.shape), *pairs]


@_lora_linear_backward.register_fake
def _(dy, x, weight, h, factors, scales, starts, stops, needs_x, needs_factors, backend):
    needs = [needs_x] + [needs_factors] * len(factors)
    inputs = [x, *factors]
    return [t.new_empty(t.shape) if need else nothing(dy) for t, need in zip(inputs, needs, strict=True)]


def _lora_linear_setup(ctx, inputs, output):
    x, weight, _, factors, scales, starts, stops, backend = inputs
    ctx.save_for_backward(x, weight, output[1], *factors)
    ctx.settings = scales, starts, stops
    ctx.backend = backend
    ctx.needs_factors = any(factor.requires_grad for factor in factors)


def _lora_linear_derivative(ctx, dy, dh):
    x, weight, h, *factors = ctx.saved_tensors
    needs_x = ctx.needs_input_grad[0]
    dx, *found = _lora_linear_backward(
        dy, x, weight, h, factors, *ctx.settings, needs_x, ctx.needs_factors, ctx.backend
    )
    given = found if ctx.needs_factors else [None] * len(factors)
    return (dx if needs_x else None), None, None, given, None, None, None, None


_lora_linear.register_autograd(_lora_linear_derivative, setup_context=_lora_linear_setup)


def lora_linear(x, weight, bias, factors, scales, starts, stops, backend: str) -> Tensor:
    """The layer's output (..., out)."""
    return _lora_linear(x, weight, bias, factors, scales, starts, stops, backend)[0]
