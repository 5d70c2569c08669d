"""Rows that a batch shares with a dropout mask for each sample. See csrc/cpu/vector/dropout.cpp."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastpeft.native.memory import pool
from fastpeft.native.vector.library import DTYPES, call

_SMALLEST = 16


class _Dropout(ctypes.Structure):
    _fields_ = [
        ("samples", ctypes.c_int64),
        ("size", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("x", "out", "row_words", "column_words")),
        ("threshold", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
        ("half", ctypes.c_int32),
    ]


def reasons(x: Tensor) -> list[str]:
    """Why rows cannot be dropped here."""
    found = [] if x.dtype in DTYPES else [f"{x.dtype} is neither float32 nor bfloat16"]
    if x.device.type != "cpu":
        found.append(f"the rows are on {x.device}, not on the CPU")
    if x.numel() < _SMALLEST:
        found.append(f"{x.numel()} numbers are fewer than {_SMALLEST}")
    return found


def forward(x: Tensor, row_words: Tensor, column_words: Tensor, p: float) -> Tensor:
    """x * mask of every sample.

    Args:
        x: any shape, fp32 or bf16.
        row_words: int32 (samples,), as of `fastpeft.ops.dropout_mask`.
        column_words: int32 (numbers of x,).
        p: probability of zero.

    Returns:
        (samples, *x.shape), of x's dtype.
    """
    x = x.contiguous()
    out = pool.empty(len(row_words), *x.shape, dtype=x.dtype)
    call("dropout_forward", _structure(x, out, x.numel(), row_words, column_words, p))
    return out


def backward(dout: Tensor, row_words: Tensor, column_words: Tensor, p: float) -> Tensor:
    """The sum over samples of dout * mask, in fp32.

    Args:
        dout: (samples, ...), fp32 or bf16.
        row_words, column_words, p: as of `forward`.
    """
    dout = dout.contiguous()
    out = torch.empty(dout.shape[1:], dtype=torch.float32)
    call("dropout_backward", _structure(dout, out, out.numel(), row_words, column_words, p))
    return out


def _structure(x: Tensor, out: Tensor, size: int, row_words: Tensor, column_words: Tensor, p: float) -> _Dropout:
    scale = float(torch.tensor(1.0 / (1.0 - p), dtype=x.dtype))
    return _Dropout(
        len(row_words), size, x.data_ptr(), out.data_ptr(), row_words.data_ptr(), column_words.data_ptr(),
        round(p * (1 << 32)) - (1 << 31), scale, torch.get_num_threads(), x.dtype == torch.bfloat16,
    )  # fmt: skip
