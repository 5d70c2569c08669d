"""The bottleneck adapter on any CPU. See csrc/cpu/vector/mlp.cpp.

    z = x W_down^T + b_down,   h = act(z),   y = scale * (h W_up^T + b_up) + residual

    dz = scale * (dy W_up) * act'(z),   dx = dz W_down (+ dy with a skip connection)
    dW_down = dz^T x,   db_down = sum of dz,   dW_up = scale * dy^T h,   db_up = scale * sum of dy

The products are torch's; what stands beside them is done in place, in one pass each. The backward pass computes z
again.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastpeft.native.memory import pool
from fastpeft.native.vector.library import call, form, in_fp32, parameter_reasons, pointer, side_by_side, type_reasons
from fastpeft.native.vector.mlp import ACTIVATIONS, activate_, differentiate_


class _Sum(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("values", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("residual_row", ctypes.c_int64),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("threads", "half", "unused")),
    ]


def reasons(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    activation: str,
    scale: float,
    *,
    residual: Tensor | None = None,
) -> list[str]:
    """Why `forward` and `backward` cannot serve these arguments; empty if they can."""
    if x.dim() != 2 or 0 in x.shape[1:]:
        return [f"x is {tuple(x.shape)}, not rows of one or more columns"]
    found = type_reasons(x)
    if activation not in ACTIVATIONS:
        found.append(f"the activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    d, hidden = x.shape[1], down_weight.shape[0]
    for name, factor, shape in (
        ("down_weight", down_weight, (hidden, d)),
        ("down_bias", down_bias, (hidden,)),
        ("up_weight", up_weight, (d, hidden)),
        ("up_bias", up_bias, (d,)),
    ):
        found += parameter_reasons(name, factor, shape, x)
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        found.append(f"the residual is {form(residual)}, x is {form(x)}")
    return found


def forward(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    activation: str,
    scale: float,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """The adapter's output with the residual.

    Args:
        x: (M, d), fp32 or bf16.
        down_weight: (hidden, d) in x's dtype or fp32.
        down_bias: (hidden,), like the weight; or None.
        up_weight: (d, hidden), likewise.
        up_bias: (d,), likewise; or None.
        activation: one of `fastpeft.native.vector.mlp.ACTIVATIONS`.
        scale: factor of the up-projection.
        residual: (M, d) in x's dtype, x itself for a skip connection; or None.

    Returns:
        (M, d) in x's dtype, contiguous.
    """
    h = _product(x, down_weight.detach().to(x.dtype).t())
    activate_(h, in_fp32(down_bias), activation)
    y = _product(h, up_weight.detach().to(x.dtype).t())
    bias = in_fp32(up_bias)
    if residual is not None or bias is not None or scale != 1.0:
        _add(y, bias, scale, residual)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    activation: str,
    scale: float,
    *,
    skip: bool,
    needs_x: bool = True,
    needs_weights: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients, None where not asked for.

    Args:
        dy: gradient of y, (M, d).
        x: as given to `forward`.
        down_weight: as given to `forward`.
        down_bias: as given to `forward`.
        up_weight: as given to `forward`.
        up_bias: as given to `forward`.
        activation: as given to `forward`.
        scale: as given to `forward`.
        skip: the residual was x itself, so that dx contains dy. The gradient of any other residual is dy.
        needs_x: compute dx.
        needs_weights: compute the gradients of the weights and of the biases that there are.

    Returns:
        dx, (M, d) in x's dtype, and the gradients of down_weight, down_bias, up_weight and up_bias in their dtypes.
    """
    if not (needs_x or needs_weights):
        return None, None, None, None, None
    down, up = down_weight.detach().to(x.dtype), up_weight.detach().to(x.dtype)
    h, dz = _product(x, down.t()), _product(dy, up)
    differentiate_(dz, h, activation, bias=in_fp32(down_bias), scale=scale, hidden=needs_weights)
    dx = None
    if needs_x:
        dx = _product(dz, down)
        if skip:
            _add(dx, None, 1.0, dy)
    if not needs_weights:
        return dx, None, None, None, None
    ddown, dup = torch.mm(dz.t(), x), torch.mm(dy.t(), h).mul_(scale)
    return (
        dx,
        ddown.to(down_weight.dtype),
        None if down_bias is None else dz.sum(0).to(down_bias.dtype),
        dup.to(up_weight.dtype),
        None if up_bias is None else dy.sum(0).mul_(scale).to(up_bias.dtype),
    )


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in memory that is kept; with `out`, neither autocast nor autograd touches it."""
    return torch.mm(a, b, out=pool.empty(a.shape[0], b.shape[1], dtype=a.dtype))


def _add(values: Tensor, bias: Tensor | None, scale: float, residual: Tensor | None) -> None:
    """Turn values into (values + bias) * scale + residual."""
    if residual is not None and not side_by_side(residual):
        residual = residual.contiguous()
    rows, columns = values.shape
    arguments = _Sum(
        rows=rows, columns=columns, values=values.data_ptr(), bias=pointer(bias), residual=pointer(residual),
        residual_row=0 if residual is None else residual.stride(0), scale=scale, threads=torch.get_num_threads(),
        half=values.dtype == torch.bfloat16,
    )  # fmt: skip
    call("adapter_sum", arguments)
