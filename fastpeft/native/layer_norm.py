"""The backward pass of a folded LayerNorm. See csrc/cpu/amx/layer_norm.cpp."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from fastpeft import _native
from fastpeft.native.blocked import BLOCK
from fastpeft.native.gemm import Matrix, check, pointer


class _LayerNormBackward(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        *((name, Matrix) for name in ("dxhat", "x", "dsum", "dx")),
        ("statistics", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("parts", ctypes.c_int64),
        ("threads", ctypes.c_int32),
    ]


@functools.cache
def _function():
    return _native.function("fastpeft_layer_norm_backward_amx", ctypes.POINTER(_LayerNormBackward))


def layer_norm_backward(dxhat: Tensor, x: Tensor, statistics: Tensor, dsum: Tensor | None, dx: Tensor) -> Tensor:
    """dx = dsum + the gradient through xhat = (x - mean) * rstd.

    Args:
        dxhat: bf16, (rows, columns) or blocked.
        x: bf16 or fp32 (rows, columns).
        statistics: fp32 (2, rows).
        dsum: like x, or None.
        dx: like x; written.
    """
    _call(dxhat, x, statistics, dsum, dx)
    return dx


def affine_layer_norm_backward(
    dy: Tensor, x: Tensor, statistics: Tensor, weight: Tensor, dsum: Tensor | None, dx: Tensor | None
) -> Tensor:
    """The same for y = weight * xhat + bias; returns the gradients of weight and bias, fp32 (2, columns).

    Args:
        dy: bf16, (rows, columns) or blocked.
        x: as of `layer_norm_backward`.
        statistics: likewise.
        weight: fp32 (columns,).
        dsum: likewise.
        dx: likewise, or None if it is not needed.
    """
    parts = min(torch.get_num_threads(), -(-x.shape[0] // BLOCK))
    sums = torch.empty(parts, 2, x.shape[1])
    _call(dy, x, statistics, dsum, dx, weight, sums)
    return sums.sum(0)


def _call(
    dxhat: Tensor,
    x: Tensor,
    statistics: Tensor,
    dsum: Tensor | None,
    dx: Tensor | None,
    weight: Tensor | None = None,
    sums: Tensor | None = None,
) -> None:
    threads = torch.get_num_threads()
    parts = min(threads, -(-x.shape[0] // BLOCK)) if sums is None else len(sums)
    call = _LayerNormBackward(
        *x.shape, *map(Matrix.of, (dxhat, x, dsum, dx)), statistics.data_ptr(), pointer(weight), pointer(sums), parts,
        threads,
    )  # fmt: skip
    check(_function()(ctypes.byref(call)))
