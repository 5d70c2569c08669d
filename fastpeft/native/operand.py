"""Matrices in the forms in which the matrix unit reads them. See csrc/cpu/amx/operand.cpp."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from fastpeft import _native
from fastpeft.native.blocked import BLOCK, blocks
from fastpeft.native.gemm import Matrix, Weight, check, gemm, pointer
from fastpeft.native.memory import pool

_NO_FORM, _COLUMNS_RIGHT, _DEPTH_RIGHT, _DEPTH_LEFT = range(4)
# Columns of a product of great depth whose sums a slab of rows has room for.
_WIDE = 1024


class _Operand(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("source", Matrix),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "statistics", "column_scale", "column_shift", "row_scale", "vector", "dots", "sums", "out",
            )
        ),
        ("parts", ctypes.c_int64),
        ("form", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]  # fmt: skip


@functools.cache
def _function():
    return _native.function("fastpeft_operand_amx", ctypes.POINTER(_Operand))


def _call(
    source: Tensor,
    rows: int,
    form: int,
    out: Tensor | None,
    statistics: Tensor | None = None,
    column_scale: Tensor | None = None,
    column_shift: Tensor | None = None,
    row_scale: Tensor | None = None,
    vector: Tensor | None = None,
    dots: Tensor | None = None,
    sums: bool = False,
) -> Tensor | None:
    """Fill `out`, if there is one, and `dots`; returns sums over the rows, fp32 (columns,), if they are asked for."""
    columns = source.shape[1] * (BLOCK if source.dim() == 4 else 1)
    threads = torch.get_num_threads()
    parts = min(threads, blocks(rows))
    found = torch.empty(parts, columns) if sums else None
    call = _Operand(
        rows, columns, Matrix.of(source), pointer(statistics), pointer(column_scale), pointer(column_shift),
        pointer(row_scale), pointer(vector), pointer(dots), pointer(found), pointer(out), parts, form, threads,
    )  # fmt: skip
    check(_function()(ctypes.byref(call)))
    return None if found is None else found.sum(0)


def weight_forward(
    w: Tensor, column_scale: Tensor | None, row_scale: Tensor | None, vector: Tensor | None = None
) -> tuple[Weight, Tensor | None]:
    """A weight for x W'^T, and W times a vector.

    Args:
        w: (out, in), bf16 or fp32; in a multiple of 32, out filled up to one with zeros. Rows that are not in one piece
            are copied.
        column_scale: fp32 (in,) or None.
        row_scale: fp32 (out,) or None.
        vector: fp32 (in,) or None.
    """
    out, depth = w.shape
    data = pool.empty(blocks(out), depth // BLOCK, 2, 16, 32, dtype=torch.bfloat16)
    dots = None if vector is None else torch.empty(out)
    _call(_in_rows(w), out, _COLUMNS_RIGHT, data, None, column_scale, None, row_scale, vector, dots)
    return Weight(data, blocks(out) * BLOCK, depth), dots


def weight_backward(w: Tensor, column_scale: Tensor | None, row_scale: Tensor | None) -> Weight:
    """A weight for dy W'; arguments as of `weight_forward`."""
    out, depth = w.shape
    data = pool.empty(depth // BLOCK, blocks(out), 2, 16, 32, dtype=torch.bfloat16)
    _call(_in_rows(w), out, _DEPTH_RIGHT, data, None, column_scale, None, row_scale)
    return Weight(data, depth, blocks(out) * BLOCK)


def _in_rows(w: Tensor) -> Tensor:
    """The weight as it is now, each row in one piece."""
    return w if w.stride(1) == 1 else w.contiguous()


def column_sums(x: Tensor, rows: int, column_scale: Tensor | None = None) -> Tensor:
    """Sums over the rows of x, row-major or blocked, with its columns scaled; fp32 (columns,)."""
    return _call(x, rows, _NO_FORM, None, column_scale=column_scale, sums=True)


def outer(
    dy: Tensor,
    x: Tensor,
    rows: int,
    dtype: torch.dtype,
    dy_scale: Tensor | None = None,
    statistics: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The gradients of a linear layer's weight, dy'^T x', and of its bias, the sums of dy'.

    dy' = dy diag(dy_scale);   x' = x, or LayerNorm(x) = xhat diag(scale) + shift with statistics.

    Args:
        dy: (rows, out), row-major or blocked.
        x: (rows, in), likewise.
        rows: of both.
        dtype: of the first result; the products come in bf16 before.
        dy_scale: fp32 (out,) or None.
        statistics: fp32 (2, rows) or None.
        scale: fp32 (in,) or None.
        shift: fp32 (in,) or None.

    Returns:
        (out, in), and fp32 (out,).
    """
    out, width = (t.shape[1] * (BLOCK if t.dim() == 4 else 1) for t in (dy, x))
    depth = blocks(rows)
    left = pool.empty(out // BLOCK, depth, BLOCK, BLOCK, dtype=torch.bfloat16)
    sums = _call(dy, rows, _DEPTH_LEFT, left, column_scale=dy_scale, sums=True)
    right = pool.empty(width // BLOCK, depth, 2, 16, 32, dtype=torch.bfloat16)
    _call(x, rows, _DEPTH_RIGHT, right, statistics, scale, shift)
    product = torch.empty(out, width, dtype=dtype)
    for begin in range(0, width, _WIDE):
        end = min(begin + _WIDE, width)
        panel = Weight(right[begin // BLOCK : end // BLOCK], end - begin, depth * BLOCK)
        gemm(left, panel, product[:, begin:end], out)
    return product, sums
