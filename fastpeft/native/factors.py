"""Gradients of narrow factors: out = left^T right, each read once. See csrc/cpu/amx/factors.cpp."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from fastpeft import _native
from fastpeft.native.blocked import BLOCK, blocks
from fastpeft.native.gemm import Matrix, check, pointer
from fastpeft.native.memory import pool


class _Factors(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "width", "columns")),
        ("left", Matrix),
        ("right", Matrix),
        ("statistics", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("parts", ctypes.c_int64),
        ("threads", ctypes.c_int32),
    ]


@functools.cache
def _function():
    return _native.function("fastpeft_factors_amx", ctypes.POINTER(_Factors))


def factors(left: Tensor, right: Tensor, rows: int, statistics: Tensor | None = None) -> Tensor:
    """left^T right, fp32 (width, columns).

    Args:
        left: blocked, bf16.
        right: blocked or (rows, columns), bf16, columns a multiple of 32.
        rows: of both.
        statistics: fp32 (2, rows): right's rows are normalised with them.
    """
    width = left.shape[1] * BLOCK
    columns = right.shape[1] * (BLOCK if right.dim() == 4 else 1)
    threads = torch.get_num_threads()
    parts = min(threads, blocks(rows))
    out = pool.empty(parts, width, columns, dtype=torch.float32)
    call = _Factors(
        rows, width, columns, Matrix.of(left), Matrix.of(right), pointer(statistics), out.data_ptr(), parts, threads
    )
    check(_function()(ctypes.byref(call)))
    return out[0] if parts == 1 else out.sum(0)
