"""`fastpeft::mlp` and its backward operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.ops.choose import choose
from fastpeft.ops.registered.common import as_rows, nothing


@torch.library.custom_op("fastpeft::mlp", mutates_args=())
def _mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    keep: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The MLP's output (..., out), and what its derivative follows from (rows, hidden)."""
    from fastpeft.ops import mlp as operator

    rows = as_rows(x)
    module = _mlp_module(rows, weight1, bias1, weight2, bias2, activation, keep, backend)
    if module is not None:
        a, kept = module.forward(rows, weight1, bias1, activation, keep=keep)
    else:
        a, kept = operator.hidden(rows, weight1, bias1, activation, keep)
    y = F.linear(a, weight2, bias2).view(*x.shape[:-1], weight2.shape[0])
    return y, (nothing(x) if kept is None else kept)


def _mlp_module(rows, weight1, bias1, weight2, bias2, activation, keep, backend):
    from fastpeft.ops import mlp as operator

    return choose(
        "mlp",
        backend,
        rows.device,
        lambda module: operator.reasons(module, rows, weight1, bias1, weight2, bias2, activation, keep),
    )


@_mlp.register_fake
def _(x, weight1, bias1, weight2, bias2, activation, keep, backend):
    y = x.new_empty(*x.shape[:-1], weight2.shape[0])
    if keep == "nothing":
        return y, nothing(x)
    rows = x.shape[:-1].numel()
    return y, x.new_empty(rows, weight1.shape[0], dtype=torch.uint8 if keep == "derivative8" else x.dtype)


@torch.library.custom_op("fastpeft::mlp_backward", mutates_args=())
def _mlp_backward(
    dy: Tensor, weight1: Tensor, weight2: Tensor, kept: Tensor, activation: str, keep: str, backend: str
) -> Tensor:
    """The gradient of the input, (..., d)."""
    from fastpeft.ops import mlp as operator

    rows = as_rows(dy)
    module = _mlp_module(rows, weight1, None, weight2, None, activation, keep, backend)
    if module is not None:
        dz = module.backward_input(rows, weight2, kept, activation, keep=keep)
    else:
        dz = operator.hidden_gradient(rows, weight2, kept, activation, keep)
    return (dz @ weight1).view(*dy.shape[:-1], weight1.shape[1])


@_mlp_backward.register_fake
def _(dy, weight1, weight2, kept, activation, keep, backend):
    return dy.new_empty(*dy.shape[:-1], weight1.shape[1])


def _mlp_setup(ctx, inputs, output):
    x, weight1, bias1, weight2, _, activation, keep, backend = inputs
    kept = (x, bias1) if keep == "nothing" else (output[1], None)
    ctx.save_for_backward(*kept, weight1, weight2)
    ctx.settings = activation, keep, backend


def _mlp_derivative(ctx, dy, dkept):
    kept, bias1, weight1, weight2 = ctx.saved_tensors
    activation, keep, backend = ctx.settings
    if keep == "nothing":
        kept, keep = F.linear(as_rows(kept), weight1, bias1), "preactivation"
    dx = _mlp_backward(dy, weight1, weight2, kept, activation, keep, backend)
    return dx, *[None] * 7


_mlp.register_autograd(_mlp_derivative, setup_context=_mlp_setup)


def mlp(x, weight1, bias1, weight2, bias2, activation: str, keep: str, backend: str) -> Tensor:
    """The MLP's output, (..., out)."""
    return _mlp(x, weight1, bias1, weight2, bias2, activation, keep, backend)[0]
