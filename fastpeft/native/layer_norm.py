"""The backward pass of a folded LayerNorm. See csrc/cpu/amx/layer_norm.cpp."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from fastpeft import _native
from fastpeft.native.gemm import Matrix, check


class _LayerNormBackward(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        *((name, Matrix) for name in ("dxhat", "x", "dsum", "dx")),
        ("statistics", ctypes.c_void_p),
        ("threads", ctypes.c_int32),
    ]


@functools.cache
def _function():
    return _native.function("fastpeft_layer_norm_backward_amx", ctypes.POINTER(_LayerNormBackward))


def layer_norm_backward(dxhat: Tensor, x: Tensor, statistics: Tensor, dsum: Tensor | None, dx: Tensor) -> Tensor:
    """dx = dsum + the gradient through xhat = (x - mean) * rstd.

    Args:
        dxhat: bf16, (rows, columns) or blocked.
        x: bf16 (rows, columns).
        statistics: fp32 (2, rows).
        dsum: like x, or None.
        dx: like x; written.
    """
    call = _LayerNormBackward(
        *x.shape, *map(Matrix.of, (dxhat, x, dsum, dx)), statistics.data_ptr(), torch.get_num_threads()
    )
    check(_function()(ctypes.byref(call)))
    return dx
