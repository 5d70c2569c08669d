"""Attention of tokens to tokens and prompts on the matrix unit. See csrc/cpu/amx/attention.h."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fastpeft import _native
from fastpeft.native.blocked import BLOCK
from fastpeft.native.gemm import check, pointer


class Heads(ctypes.Structure):
    """Where the rows of all heads lie; nothing, if made without arguments."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("head", ctypes.c_int64),
        ("row", ctypes.c_int64),
        ("layout", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    ]

    @classmethod
    def strided(cls, t: Tensor | None) -> Heads:
        """Of (B, H, N, D) with any strides but the last, which is 1; of (H, p, D) that the batch shares; of None."""
        if t is None:
            return cls()
        if t.dim() == 3:
            return cls(t.data_ptr(), 0, t.stride(0), t.stride(1), 0, 0)
        return cls(t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), 0, 0)

    @classmethod
    def blocked(cls, t: Tensor, rows: int, column: int = 0) -> Heads:
        """Of a blocked tensor with so many rows a sample, whose first head begins at a column."""
        return cls(t.data_ptr(), rows, column, t.stride(0) // (BLOCK * BLOCK), 1, 0)


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "heads", "queries", "tokens", "prompts", "dim")),
        *((name, Heads) for name in ("q", "k", "v", "prompt_k", "prompt_v", "out")),
        ("lse", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int32),
        *((name, Heads) for name in ("dout", "dq", "dk", "dv")),
        ("dprompt_k", ctypes.c_void_p),
        ("dprompt_v", ctypes.c_void_p),
        ("parts", ctypes.c_int64),
    ]


@functools.cache
def _function(name: str):
    return _native.function(f"fastpeft_attention_{name}_amx", ctypes.POINTER(_Attention))


class Shape(NamedTuple):
    """Sizes of a call; `prompts` of the keys are not tokens."""

    batch: int
    heads: int
    queries: int
    tokens: int
    prompts: int
    dim: int


def attention_forward(
    shape: Shape, q: Heads, k: Heads, v: Heads, prompt_k: Heads, prompt_v: Heads, out: Heads, scale: float
) -> Tensor:
    """Write out and return the log-sum-exp, fp32 (B, H, Nq)."""
    lse = torch.empty(shape.batch, shape.heads, shape.queries)
    call = _Attention(
        *shape, q, k, v, prompt_k, prompt_v, out, lse.data_ptr(), scale, torch.get_num_threads()
    )  # fmt: skip
    check(_function("forward")(ctypes.byref(call)))
    return lse


def attention_backward(
    shape: Shape,
    q: Heads,
    k: Heads,
    v: Heads,
    prompt_k: Heads,
    prompt_v: Heads,
    lse: Tensor,
    scale: float,
    dout: Heads,
    dq: Heads,
    dk: Heads,
    dv: Heads,
    needs_prompts: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Write dq, dk and dv where they are given, and return the prompts' gradients in fp32, shaped as the prompts."""
    threads = torch.get_num_threads()
    shared = prompt_k.batch == 0
    # As many parts of the batch as keep all threads busy, each with sums of its own.
    parts = min(shape.batch, -(-threads // shape.heads)) if shared else shape.batch
    sums = [
        torch.zeros(parts, shape.heads, shape.prompts, shape.dim) if needed and shape.prompts else None
        for needed in needs_prompts
    ]
    call = _Attention(
        *shape, q, k, v, prompt_k, prompt_v, Heads(), lse.data_ptr(), scale, threads, dout, dq, dk, dv,
        pointer(sums[0]), pointer(sums[1]), parts,
    )  # fmt: skip
    check(_function("backward")(ctypes.byref(call)))
    if not shared:
        return sums[0], sums[1]
    return tuple(None if t is None else t[0] if parts == 1 else t.sum(0) for t in sums)
