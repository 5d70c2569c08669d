"""A bottleneck adapter, forward and backward, each reading its rows once. See csrc/cpu/amx/bottleneck.cpp."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from fastpeft import _native
from fastpeft.native import blocked
from fastpeft.native.gemm import ACTIVATIONS, Matrix, Weight, check, pointer

# Numbers of a factor that stays in the second-level cache beside the other, the sums of both gradients and some rows.
_MOST = 128 * 1024


class _Forward(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "width", "hidden")),
        *((name, Matrix) for name in ("a", "other", "y", "h")),
        *((name, ctypes.c_void_p) for name in ("slopes", "down", "up", "down_bias", "up_bias")),
        ("activation", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


class _Backward(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "width", "hidden")),
        *((name, Matrix) for name in ("dy", "a", "h")),
        *((name, ctypes.c_void_p) for name in ("statistics", "slopes", "up", "down")),
        *((name, Matrix) for name in ("dz", "da")),
        *((name, ctypes.c_void_p) for name in ("down_sums", "up_sums")),
        ("parts", ctypes.c_int64),
        ("threads", ctypes.c_int32),
    ]


@functools.cache
def _forward():
    return _native.function("fastpeft_bottleneck_forward_amx", ctypes.POINTER(_Forward))


@functools.cache
def _backward():
    return _native.function("fastpeft_bottleneck_backward_amx", ctypes.POINTER(_Backward))


def fits(width: int, hidden: int) -> bool:
    """Whether one pass is faster than a product after the other.

    Args:
        width: of the rows.
        hidden: units.
    """
    return width * hidden <= _MOST


def forward(
    a: Tensor,
    down: Weight,
    down_bias: Tensor | None,
    activation: str,
    up: Weight,
    up_bias: Tensor | None,
    other: Tensor | None,
    y: Tensor,
    rows: int,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """y = a + other + h W_up^T + b_up with h = act(a W_down^T + b_down); h and the activation's derivative, blocked.

    Args:
        a: blocked (rows, d).
        down: W_down, hidden columns.
        down_bias: fp32 (hidden,).
        activation: name.
        up: W_up, hidden deep.
        up_bias: fp32 (d,).
        other: (rows, d), bf16 or fp32, or None.
        y: written, like other.
        rows: of all of these.
        keep: whether the derivative is wanted.
    """
    h = blocked.empty(rows, down.columns)
    slopes = blocked.empty(rows, down.columns) if keep else None
    call = _Forward(
        rows, down.depth, down.columns, Matrix.of(a), Matrix.of(other), Matrix.of(y), Matrix.of(h), pointer(slopes),
        down.data.data_ptr(), up.data.data_ptr(), pointer(down_bias), pointer(up_bias), ACTIVATIONS.index(activation),
        torch.get_num_threads(),
    )  # fmt: skip
    check(_forward()(ctypes.byref(call)))
    return h, slopes


def backward(
    dy: Tensor,
    a: Tensor,
    h: Tensor,
    slopes: Tensor,
    up: Weight,
    down: Weight | None,
    rows: int,
    statistics: Tensor | None,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dz = (dy W_up) * act' and da = dy + dz W_down, blocked; dW_down and dW_up^T, fp32 (hidden, d).

    Args:
        dy: (rows, d), bf16 or fp32.
        a: what the adapter read, blocked or (rows, d).
        h: blocked.
        slopes: blocked.
        up: W_up with d as depth.
        down: W_down with hidden as depth; None: da is not needed.
        rows: of all of these.
        statistics: fp32 (2, rows): a's rows are normalised with them.
        needs: which gradients.
    """
    width, hidden = up.depth, up.columns
    dz = blocked.empty(rows, hidden)
    da = None if down is None else blocked.empty(rows, width)
    threads = torch.get_num_threads()
    parts = min(threads, blocked.blocks(rows))
    sums = [torch.empty(parts, hidden, width) if needed else None for needed in needs]
    call = _Backward(
        rows, width, hidden, Matrix.of(dy), Matrix.of(a), Matrix.of(h), pointer(statistics), slopes.data_ptr(),
        up.data.data_ptr(), None if down is None else down.data.data_ptr(), Matrix.of(dz), Matrix.of(da),
        pointer(sums[0]), pointer(sums[1]), parts, threads,
    )  # fmt: skip
    check(_backward()(ctypes.byref(call)))
    return dz, da, *(None if t is None else t[0] if parts == 1 else t.sum(0) for t in sums)
