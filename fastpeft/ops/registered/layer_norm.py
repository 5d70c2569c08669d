"""`fastpeft::add_layer_norm` and its backward operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpeft.ops.choose import choose
from fastpeft.ops.registered.common import as_rows, fake_gradients, gathered, given, nothing


@torch.library.custom_op("fastpeft::add_layer_norm", mutates_args=())
def _add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum (empty without a branch), its LayerNorm, and mean and 1 / deviation of each row in fp32."""
    from fastpeft.ops import layer_norm as operator

    module = choose(
        "layer_norm", backend, x.device, lambda module: module.reasons(x, weight, bias, eps, branch=branch, gamma=gamma)
    )
    rows = x.shape[:-1].numel()
    if module is not None:
        y, s, mean, rstd = module.forward(x, weight, bias, eps, branch=branch, gamma=gamma)
    else:
        s, y = (t.to(x.dtype) for t in operator.reference(x, branch, gamma, weight, bias, eps))
        mean, rstd = (x.new_zeros(rows, dtype=torch.float32) for _ in range(2))
    return (nothing(x) if branch is None else s), y, mean, rstd


@_add_layer_norm.register_fake
def _(x, branch, gamma, weight, bias, eps, backend):
    s = nothing(x) if branch is None else x.new_empty(x.shape)
    rows = x.shape[:-1].numel()
    return s, x.new_empty(x.shape), *(x.new_empty(rows, dtype=torch.float32) for _ in range(2))


@torch.library.custom_op("fastpeft::add_layer_norm_backward", mutates_args=())
def _add_layer_norm_backward(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    gamma: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    """Gradients of x, branch, weight and bias; empty where not needed."""

    needs_x, needs_branch, needs_weight, needs_bias = needs
    module = choose("layer_norm", backend, s.device, lambda module: module.reasons(s, weight, bias, eps, gamma=gamma))
    if module is not None:
        dx, dbranch, dbias, dweight = module.backward(
            dy,
            s,
            weight,
            mean,
            rstd,
            ds=ds,
            gamma=gamma,
            needs_x=needs_x,
            needs_branch=needs_branch,
            needs_bias=needs_bias,
            needs_weight=needs_weight,
            bias_dtype=None if bias is None else bias.dtype,
        )
        found = dx, dbranch, dweight, dbias
    else:
        found = _reference_gradients(dy, ds, s, gamma, weight, eps)
    return gathered(found, (s, s, weight, bias), needs, dy)


def _reference_gradients(dy, ds, s, gamma, weight, eps: float):
    """With n = (s - mean) / deviation and g = dy weight: ds += (g - mean(g) - n mean(g n)) / deviation."""
    centred = s - s.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    n = centred * rstd
    g = dy if weight is None else dy * weight.to(dy.dtype)
    dx = (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True)) * rstd
    if ds is not None:
        dx = dx + ds
    return dx, dx if gamma is None else dx * gamma, as_rows(dy * n).sum(0), as_rows(dy).sum(0)


@_add_layer_norm_backward.register_fake
def _(dy, ds, s, gamma, weight, bias, mean, rstd, eps, needs, backend):
    return fake_gradients((s, s, weight, bias), needs, dy)


def _add_layer_norm_setup(ctx, inputs, output):
    x, branch, gamma, weight, bias, eps, backend = inputs
    s, _, mean, rstd = output
    ctx.save_for_backward(x if branch is None else s, gamma, weight, bias, mean, rstd)
    ctx.settings = eps, backend, branch is None


def _add_layer_norm_derivative(ctx, ds, dy, dmean, drstd):
    eps, backend, alone = ctx.settings
    x, branch, _, weight, bias = ctx.needs_input_grad[:5]
    needs = [x, branch, weight, bias]
    found = _add_layer_norm_backward(dy, None if alone else ds, *ctx.saved_tensors, eps, needs, backend)
    dx, dbranch, dweight, dbias = given(found, needs)
    return dx, dbranch, None, dweight, dbias, None, None


_add_layer_norm.register_autograd(_add_layer_norm_derivative, setup_context=_add_layer_norm_setup)


def add_layer_norm(x, branch, gamma, weight, bias, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    """The residual sum and its LayerNorm."""
    s, y, _, _ = _add_layer_norm(x, branch, gamma, weight, bias, eps, backend)
    return (x if branch is None else s), y
