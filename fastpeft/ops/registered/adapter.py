"""`fastpeft::adapter` and its backward operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.ops.activation import DERIVATIVES, FUNCTIONS
from fastpeft.ops.choose import choose
from fastpeft.ops.registered.common import as_rows, fake_gradients, gathered, given


@torch.library.custom_op("fastpeft::adapter", mutates_args=())
def adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    activation: str,
    scale: float,
    residual: Tensor | None,
    backend: str,
) -> Tensor:
    """The adapter's output, (..., d)."""
    from fastpeft.ops import adapter as operator

    factors = (down_weight, down_bias, up_weight, up_bias)
    rows, beside = as_rows(x), as_rows(residual)
    module = choose(
        "adapter", backend, x.device, lambda module: module.reasons(rows, *factors, activation, scale, residual=beside)
    )
    if module is not None:
        return module.forward(rows, *factors, activation, scale, residual=beside).view(x.shape)
    return operator.reference(x, *factors, activation, scale, residual)


@adapter.register_fake
def _(x, down_weight, down_bias, up_weight, up_bias, activation, scale, residual, backend):
    return x.new_empty(x.shape)


@torch.library.custom_op("fastpeft::adapter_backward", mutates_args=())
def _adapter_backward(
    dy: Tensor,
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    activation: str,
    scale: float,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    """Gradients of x and the four factors, without what a residual adds; empty where not needed."""

    factors = (down_weight, down_bias, up_weight, up_bias)
    rows = as_rows(x)
    module = choose(
        "adapter", backend, x.device, lambda module: module.reasons(rows, *factors, activation, scale, residual=None)
    )
    if module is not None:
        dx, *found = module.backward(
            as_rows(dy),
            rows,
            *factors,
            activation,
            scale,
            skip=False,
            needs_x=needs[0],
            needs_weights=any(needs[1:]),
        )
        return gathered([None if dx is None else dx.view(x.shape), *found], (x, *factors), needs, dy)
    return gathered(_reference_gradients(dy, x, *factors, activation, scale), (x, *factors), needs, dy)


def _reference_gradients(dy, x, down_weight, down_bias, up_weight, up_bias, activation: str, scale: float):
    """z = x W_down^T + b_down,  dh = scale dy W_up,  dz = dh act'(z), and the products of each with its input."""
    cast = (None if t is None else t.to(x.dtype) for t in (down_weight, down_bias, up_weight))
    down_weight, down_bias, up_weight = cast
    rows, dy_rows = as_rows(x), scale * as_rows(dy)
    z = F.linear(rows, down_weight, down_bias)
    dz = (dy_rows @ up_weight) * DERIVATIVES[activation](z)
    dx = (dz @ down_weight).view(x.shape)
    return dx, dz.t() @ rows, dz.sum(0), dy_rows.t() @ FUNCTIONS[activation](z), dy_rows.sum(0)


@_adapter_backward.register_fake
def _(dy, x, down_weight, down_bias, up_weight, up_bias, activation, scale, needs, backend):
    return fake_gradients((x, down_weight, down_bias, up_weight, up_bias), needs, dy)


def _adapter_setup(ctx, inputs, output):
    x, down_weight, down_bias, up_weight, up_bias, activation, scale, _, backend = inputs
    ctx.save_for_backward(x, down_weight, down_bias, up_weight, up_bias)
    ctx.settings = activation, scale
    ctx.backend = backend


def _adapter_derivative(ctx, dy):
    needs = list(ctx.needs_input_grad[:5])
    found = _adapter_backward(dy, *ctx.saved_tensors, *ctx.settings, needs, ctx.backend)
    return (*given(found, needs), None, None, dy if ctx.needs_input_grad[7] else None, None)


adapter.register_autograd(_adapter_derivative, setup_context=_adapter_setup)
