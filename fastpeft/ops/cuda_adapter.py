"""The CUDA kernels of csrc/cuda in the place of adapter.

z = x down^T + down_bias,   h = act(z),   y = scale * (h up^T + up_bias) + residual

dz = scale * (dy up) * act'(z),   dx = dz down (+ dy with a skip connection)
d down = dz^T x,   d down_bias = sum of dz,   d up = scale * dy^T h,   d up_bias = scale * sum of dy
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft import _cuda

# Name of the activation -> its number in csrc/cuda/activation.cuh, as in kernels/_activation.py.
CODES = {"identity": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "quick_gelu": 4, "silu": 5}
MOST_HIDDEN = 128
_STEP = 8  # elements of 16 bytes
_NEEDS_X, _NEEDS_WEIGHTS = 1, 2


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
    found = _cuda.device_reasons(x)
    if x.dim() != 2 or x.numel() == 0:
        return [*found, f"x is {tuple(x.shape)}, not one or more rows"]
    if x.dtype not in (torch.float16, torch.bfloat16):
        found.append(f"x must be fp16 or bf16, not {x.dtype}")
    if x.shape[1] % _STEP:
        found.append(f"the width must be a multiple of {_STEP}, not {x.shape[1]}")
    if activation not in CODES:
        found.append(f"the activation {activation!r} is not one of {', '.join(CODES)}")
    width, hidden = x.shape[1], down_weight.shape[0]
    if not 1 <= hidden <= MOST_HIDDEN:
        found.append(f"there are {hidden} hidden units, not 1 to {MOST_HIDDEN}")
    for name, factor, shape in (
        ("down_weight", down_weight, (hidden, width)),
        ("down_bias", down_bias, (hidden,)),
        ("up_weight", up_weight, (width, hidden)),
        ("up_bias", up_bias, (width,)),
    ):
        if factor is not None and (
            factor.shape != shape or factor.device != x.device or not factor.is_floating_point()
        ):
            found.append(
                f"{name} is {factor.dtype} {tuple(factor.shape)} on {factor.device}, not {shape} on {x.device}"
            )
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        found.append(f"the residual is {residual.dtype} {tuple(residual.shape)} on {residual.device}, not like x")
    for name, t in (("x", x), ("the residual", residual)):
        if t is not None and not _cuda.aligned(t):
            found.append(f"rows of {name} must be contiguous and start at multiples of {_cuda.ALIGNMENT} bytes")
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
        x: (M, d) in fp16 or bf16, rows aligned to 16 bytes; d a multiple of 8.
        down_weight: (hidden, d), hidden from 1 to 128, in x's dtype or rounded to it, as are the other factors.
        down_bias: (hidden,) or None.
        up_weight: (d, hidden).
        up_bias: (d,) or None.
        activation: a name of `CODES`.
        scale: factor of the up-projection.
        residual: (M, d) in x's dtype, x itself for a skip connection; or None.

    Returns:
        (M, d) in x's dtype, contiguous.

    Raises:
        RuntimeError: what `reasons` names.
    """
    down, down_bias, up = _padded(x, down_weight, down_bias, up_weight)
    if up_bias is not None:
        up_bias = _cuda.realigned(up_bias.to(x.dtype))
    return _cuda.library().adapter_forward(x, down, down_bias, up, up_bias, residual, CODES[activation], scale)


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
    """Gradients, None where not asked for. The weights' are products of torch with what one kernel leaves.

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

    Raises:
        RuntimeError: what `reasons` names.
    """
    if not (needs_x or needs_weights):
        return None, None, None, None, None
    dy = _cuda.realigned(dy)
    needs = _NEEDS_X * needs_x + _NEEDS_WEIGHTS * needs_weights
    factors = _padded(x, down_weight, down_bias, up_weight)
    add = dy if skip else None
    dx, dz, h = _cuda.library().adapter_backward(dy, x, *factors, add, CODES[activation], scale, needs)
    if not needs_weights:
        return dx, None, None, None, None
    dz, h = (t[:, : down_weight.shape[0]] for t in (dz, h))
    return (
        dx if needs_x else None,
        (dz.t() @ x).to(down_weight.dtype),
        None if down_bias is None else dz.sum(0, dtype=torch.float32).to(down_bias.dtype),
        (dy.t() @ h).mul_(scale).to(up_weight.dtype),
        None if up_bias is None else dy.sum(0, dtype=torch.float32).mul_(scale).to(up_bias.dtype),
    )


def _padded(
    x: Tensor, down_weight: Tensor, down_bias: Tensor | None, up_weight: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The factors that have hidden units, in x's dtype, with units of zeros up to a multiple of 8."""
    more = -down_weight.shape[0] % _STEP
    down, up = down_weight.to(x.dtype), up_weight.to(x.dtype)
    bias = None if down_bias is None else down_bias.to(x.dtype)
    if more:
        down, up = F.pad(down, (0, 0, 0, more)), F.pad(up, (0, more))
        bias = None if bias is None else F.pad(bias, (0, more))
    down, up = (
        t if t.is_contiguous() and _cuda.aligned(t) else t.clone(memory_format=torch.contiguous_format)
        for t in (down, up)
    )
    return down, None if bias is None else _cuda.realigned(bias), up
