"""Products with a frozen weight on the matrix unit. See csrc/cpu/amx/gemm.h.

C = epilogue(prologue(A) W^T + A2 W2^T)
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from fastpeft import _native
from fastpeft.native.blocked import BLOCK, blocks
from fastpeft.native.memory import arena

ACTIVATIONS = ("identity", "relu", "gelu", "gelu_tanh", "quick_gelu", "silu")
# Of rows and of weights.
DTYPES = (torch.bfloat16, torch.float32)
_KEPT = {None: 0, torch.bfloat16: 1, torch.uint8: 2}
_STORE, _RESIDUAL, _ACTIVATE, _SCALE = range(4)
_OUT_OF_RANGE = 2  # csrc/cpu/common.h


class Matrix(ctypes.Structure):
    """A matrix: bf16 or fp32 rows apart by any stride, or bf16 in blocks; nothing, if made without arguments."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("layout", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    ]

    @classmethod
    def of(cls, t: Tensor | None) -> Matrix:
        """Of (rows, columns), of a blocked tensor, of None.

        Raises:
            ValueError: it is read in another format or order than that of the tensor.
        """
        if t is None:
            return cls()
        if t.dim() == 4:
            if t.dtype != torch.bfloat16:
                raise ValueError(f"a blocked matrix must be in bfloat16, not {_form(t)}")
            return cls(t.data_ptr(), t.stride(0) // (BLOCK * BLOCK), 1, 0)
        if t.dtype not in DTYPES or t.stride(1) != 1:
            raise ValueError(f"a matrix must be in bfloat16 or float32 with rows in one piece, not {_form(t)}")
        return cls(t.data_ptr(), t.stride(0), 2 if t.dtype == torch.float32 else 0, 0)


class _Gemm(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "columns", "depth", "extra")),
        *((name, Matrix) for name in ("a", "c", "other", "another")),
        *((name, ctypes.c_void_p) for name in ("weight", "extra_weight", "down_weight", "down_bias", "down_slopes")),
        ("down", ctypes.c_int64),
        ("a2", Matrix),
        *((name, ctypes.c_void_p) for name in ("bias", "statistics", "kept")),
        ("epsilon", ctypes.c_float),
        *(
            (name, ctypes.c_int32)
            for name in ("prologue", "epilogue", "activation", "keep", "down_activation", "threads")
        ),
    ]


@functools.cache
def _gemm():
    return _native.function("fastpeft_gemm_amx", ctypes.POINTER(_Gemm))


@functools.cache
def _pack():
    integer, pointer, flag = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32
    arguments = (pointer, integer, integer, integer, integer, flag, pointer, pointer, pointer, flag)
    return _native.function("fastpeft_pack_amx", *arguments)


def pointer(t: Tensor | None) -> int | None:
    """Where a tensor's numbers begin."""
    return None if t is None else t.data_ptr()


@dataclass
class Weight:
    """A right factor, packed.

    Attributes:
        data: bf16 (panels, steps, 2, 16, 32).
        columns: its columns, as the product has them.
        depth: numbers of a row of the left factor.
    """

    data: Tensor
    columns: int
    depth: int


def _form(t: Tensor) -> str:
    return f"{t.dtype} with strides {tuple(t.stride())}"


def pack(w: Tensor, column_scale: Tensor | None = None, row_scale: Tensor | None = None) -> Weight:
    """Pack a right factor.

    Args:
        w: (columns, depth), fp32 or bf16, any strides; columns and depth are filled up to multiples of 32.
        column_scale: fp32 (depth,), multiplied into each row.
        row_scale: fp32 (columns,), multiplied into each column.

    Raises:
        ValueError: w is of another format.
    """
    if w.dtype not in DTYPES:
        raise ValueError(f"a weight must be in bfloat16 or float32, not {_form(w)}")
    columns, depth = w.shape
    data = arena.empty(blocks(columns), blocks(depth), 2, 16, 32, dtype=torch.bfloat16)
    check(
        _pack()(
            w.data_ptr(), columns, depth, *w.stride(), w.dtype == torch.float32, pointer(column_scale),
            pointer(row_scale), data.data_ptr(), torch.get_num_threads(),
        )
    )  # fmt: skip
    return Weight(data, blocks(columns) * BLOCK, blocks(depth) * BLOCK)


def check(status: int) -> None:
    """Raise what a native function returned."""
    if status == _OUT_OF_RANGE:
        raise IndexError("a length is not in the range that the keys allow")
    if status:
        raise MemoryError("the native CPU library could not get memory")


def gemm(
    a: Tensor,
    weight: Weight,
    c: Tensor,
    rows: int,
    bias: Tensor | None = None,
    other: Tensor | None = None,
    activation: str | None = None,
    kept: Tensor | None = None,
    statistics: Tensor | None = None,
    epsilon: float = 0.0,
    a2: Tensor | None = None,
    extra: Weight | None = None,
    down: Weight | None = None,
    down_bias: Tensor | None = None,
    down_activation: str = "identity",
    down_slopes: Tensor | None = None,
    another: Tensor | None = None,
) -> Tensor:
    """c = epilogue(prologue(a) W^T + a2 extra^T).

    Args:
        a: (rows, depth) with rows apart by any stride, bf16 or fp32, or blocked.
        weight: W.
        c: (rows, columns) or blocked; written.
        rows: rows of a and c.
        bias: fp32 (columns,).
        other: added, like c.
        activation: name; c is the activation of the sum, its derivative goes to `kept`.
        kept: blocked, bf16 or uint8. Without `activation` the sum is multiplied by what is in it.
        statistics: fp32 (2, rows); given, a is normalised over its columns and mean and 1 / deviation are written.
        epsilon: of the normalisation.
        a2: blocked (rows, extra depth): read, or written if `down` is given.
        extra: W2.
        down: a2 = act(prologue(a) down^T + down_bias).
        down_bias: fp32 (down's columns,).
        down_activation: name of that.
        down_slopes: blocked, bf16, like a2; its derivative is written there.
        another: added besides `other`.
    """
    epilogue = _ACTIVATE if activation else _SCALE if kept is not None else _RESIDUAL if other is not None else _STORE
    call = _Gemm(
        rows=rows,
        columns=weight.columns,
        depth=weight.depth,
        extra=0 if extra is None else extra.depth,
        a=Matrix.of(a),
        c=Matrix.of(c),
        other=Matrix.of(other),
        another=Matrix.of(another),
        weight=weight.data.data_ptr(),
        extra_weight=None if extra is None else extra.data.data_ptr(),
        down_weight=None if down is None else down.data.data_ptr(),
        down_bias=pointer(down_bias),
        down_slopes=pointer(down_slopes),
        down=0 if down is None else down.columns,
        a2=Matrix.of(a2),
        bias=pointer(bias),
        statistics=pointer(statistics),
        kept=pointer(kept),
        epsilon=epsilon,
        prologue=0 if statistics is None else 1,
        epilogue=epilogue,
        activation=ACTIVATIONS.index(activation or "identity"),
        keep=_KEPT[None if kept is None else kept.dtype],
        down_activation=ACTIVATIONS.index(down_activation),
        threads=torch.get_num_threads(),
    )
    check(_gemm()(ctypes.byref(call)))
    return c
