"""LayerNorm with the residual sum before it, on any CPU. See csrc/cpu/vector/layer_norm.cpp.

s = x + gamma * branch,   y = xhat * weight + bias,   xhat = (s - mean) * rstd

g = dy * weight,   dx = rstd * (g - mean_d(g) - xhat * mean_d(g * xhat)) + ds,   dbranch = gamma * dx
dweight = sum over rows of dy * xhat,   dbias = sum over rows of dy
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastpeft.native.vector.library import (
    call,
    empty_like,
    form,
    in_fp32,
    parameter_reasons,
    pointer,
    side_by_side,
    type_reasons,
)

# Rows whose share of a parameter's gradient is summed in one piece: the sums do not depend on the number of threads.
_PART = 256


class _Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("batch", ctypes.c_int64), ("row", ctypes.c_int64)]

    @classmethod
    def of(cls, t: Tensor | None, rows: int) -> _Rows:
        """Of (..., d) whose last dimension but one has so many rows, or that lies row after row; of None."""
        if t is None:
            return cls()
        if t.is_contiguous():
            return cls(t.data_ptr(), rows * t.shape[-1], t.shape[-1])
        return cls(t.data_ptr(), t.stride(-3) if t.dim() > 2 else 0, t.stride(-2))


class _LayerNorm(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("count", "rows", "columns")),
        *((name, _Rows) for name in ("x", "branch", "s", "y")),
        *((name, ctypes.c_void_p) for name in ("gamma", "weight", "bias", "mean", "rstd")),
        ("epsilon", ctypes.c_float),
        ("threads", ctypes.c_int32),
        *((name, _Rows) for name in ("dy", "ds", "dx", "dbranch")),
        ("dweight", ctypes.c_void_p),
        ("dbias", ctypes.c_void_p),
        ("parts", ctypes.c_int64),
        ("half", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    ]


def reasons(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    branch: Tensor | None = None,
    gamma: Tensor | None = None,
) -> list[str]:
    """Why `forward` and `backward` cannot serve these arguments; empty if they can."""
    if not x.dim() or not x.shape[-1]:
        return ["there are no rows of one or more columns"]
    found = type_reasons(x)
    if branch is not None and (branch.shape, branch.dtype, branch.device) != (x.shape, x.dtype, x.device):
        found.append(f"the branch is {form(branch)}, x is {form(x)}")
    for name, parameter in (("weight", weight), ("bias", bias), ("gamma", gamma)):
        found += parameter_reasons(name, parameter, x.shape[-1:], x)
    return found


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    branch: Tensor | None = None,
    gamma: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The normalised sum and what its backward pass keeps.

    Args:
        x: (..., d), fp32 or bf16, any strides.
        weight: (d,) in x's dtype or fp32, or None.
        bias: like weight.
        eps: added to the variance.
        branch: of x's shape and dtype, or None.
        gamma: factor of the branch, like weight; has no effect without a branch.

    Returns:
        y and s, (..., d) in x's dtype, s being x itself without a branch; mean and rstd, (rows,) in fp32.
    """
    y = empty_like(x)
    s = x if branch is None else empty_like(x)
    count = x.numel() // x.shape[-1]
    mean, rstd = torch.empty(count), torch.empty(count)
    rows = _row_count(x)
    x, branch = _readable(x), _readable(branch)
    weight, bias, gamma = map(in_fp32, (weight, bias, gamma))
    arguments = _LayerNorm(
        count=count, rows=rows, columns=x.shape[-1], x=_Rows.of(x, rows), branch=_Rows.of(branch, rows),
        s=_Rows.of(None if branch is None else s, rows), y=_Rows.of(y, rows), gamma=pointer(gamma),
        weight=pointer(weight), bias=pointer(bias), mean=mean.data_ptr(), rstd=rstd.data_ptr(), epsilon=eps,
        threads=torch.get_num_threads(), half=x.dtype == torch.bfloat16,
    )  # fmt: skip
    call("layer_norm_forward", arguments)
    return y, s, mean, rstd


def backward(
    dy: Tensor,
    s: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    ds: Tensor | None = None,
    gamma: Tensor | None = None,
    needs_x: bool = True,
    needs_branch: bool = False,
    needs_bias: bool = False,
    needs_weight: bool = False,
    bias_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients, None where not asked for.

    Args:
        dy: gradient of y, (..., d).
        s: as returned by `forward`.
        weight: as given to `forward`.
        mean: as returned by `forward`.
        rstd: as returned by `forward`.
        ds: gradient that arrives at s from elsewhere, (..., d), or None.
        gamma: as given to `forward`.
        needs_x: compute dx.
        needs_branch: compute dbranch.
        needs_bias: compute dbias.
        needs_weight: compute dweight.
        bias_dtype: of dbias, since the bias itself is not given; None for the weight's, or s's without a weight.

    Returns:
        dx and dbranch, (..., d) in s's dtype, one and the same tensor without a gamma; dbias, (d,) in
        `bias_dtype`; dweight, (d,) in the weight's dtype. Equal inputs give equal bits, with any number of threads.
    """
    needs_weight = needs_weight and weight is not None
    bias_dtype = bias_dtype or (s if weight is None else weight).dtype
    if not (needs_x or needs_branch or needs_bias or needs_weight):
        return None, None, None, None
    d = s.shape[-1]
    count, rows = s.numel() // d, _row_count(s)
    apart = needs_branch and gamma is not None
    dx = empty_like(s) if needs_x or (needs_branch and not apart) else None
    dbranch = empty_like(s) if apart else None
    sums = needs_bias or needs_weight
    parts = max(1, -(-count // _PART)) if sums else min(count, 4 * torch.get_num_threads())
    dweight, dbias = (torch.empty(parts, d) if need else None for need in (needs_weight, needs_bias))
    dy, held, ds = _readable(dy), _readable(s), _readable(ds)
    weight_dtype = None if weight is None else weight.dtype
    weight, gamma = in_fp32(weight), in_fp32(gamma)
    arguments = _LayerNorm(
        count=count, rows=rows, columns=d, s=_Rows.of(held, rows), gamma=pointer(gamma), weight=pointer(weight),
        mean=mean.data_ptr(), rstd=rstd.data_ptr(), threads=torch.get_num_threads(), dy=_Rows.of(dy, rows),
        ds=_Rows.of(ds, rows), dx=_Rows.of(dx, rows), dbranch=_Rows.of(dbranch, rows), dweight=pointer(dweight),
        dbias=pointer(dbias), parts=parts, half=s.dtype == torch.bfloat16,
    )  # fmt: skip
    call("layer_norm_backward", arguments)
    return (
        dx if needs_x else None,
        (dbranch if apart else dx) if needs_branch else None,
        dbias.sum(0).to(bias_dtype) if needs_bias else None,
        dweight.sum(0).to(weight_dtype) if needs_weight else None,
    )


def _row_count(t: Tensor) -> int:
    """Rows that follow on each other at one stride, whatever the strides are."""
    return max(1, t.shape[-2]) if t.dim() > 1 else 1


def _readable(t: Tensor | None) -> Tensor | None:
    """The tensor as `_Rows` can describe it, or a copy."""
    if t is None or t.is_contiguous() or (t.dim() in (2, 3) and side_by_side(t)):
        return t
    return t.contiguous()
