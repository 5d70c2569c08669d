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
        *((name, Heads) for name in ("dout", "dq", "dk", "dv", "dprompt_k", "dprompt_v")),
        ("prompt_k_sums", ctypes.c_void_p),
        ("prompt_v_sums", ctypes.c_void_p),
        ("parts", ctypes.c_int64),
        ("lengths", ctypes.c_void_p),
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
    shape: Shape,
    q: Heads,
    k: Heads,
    v: Heads,
    prompt_k: Heads,
    prompt_v: Heads,
    out: Heads,
    scale: float,
    lengths: Tensor | None = None,
) -> Tensor:
    """Write out and return the log-sum-exp, fp32 (B, H, Nq).

    Args:
        shape, q, k, v, prompt_k, prompt_v, out, scale: as the structure has them.
        lengths: int32 (B,), tokens of each sample that are seen, at least one key each with the prompts; None for all.
    """
    lse = torch.empty(shape.batch, shape.heads, shape.queries)
    call = _Attention(
        *shape, q, k, v, prompt_k, prompt_v, out, lse.data_ptr(), scale, torch.get_num_threads(),
        lengths=pointer(lengths),
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
    places: tuple[Heads, Heads] | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Write dq, dk and dv where a place is given for them, and return the prompts' gradients.

    Args:
        shape, q, k, v, prompt_k, prompt_v, scale: as of the forward pass.
        lse: what it returned.
        dout: gradient of its output.
        dq, dk, dv: places of the gradients; one without data is not needed.
        needs_prompts: which of the prompts' gradients are needed.
        places: of the gradients of prompts of each sample's own, which are then not returned.
        lengths: as of the forward pass.

    Returns:
        fp32 (H, p, D) of prompts that the batch shares, bf16 (B, H, p, D) of each sample's own; None where not needed.
    """
    threads = torch.get_num_threads()
    size = (shape.heads, shape.prompts, shape.dim)
    needs = [needed and shape.prompts > 0 for needed in needs_prompts]
    found: list[Tensor | None] = [None, None]
    sums: list[Tensor | None] = [None, None]
    # As many parts of the batch as keep all threads busy, each with sums of its own.
    parts = min(shape.batch, -(-threads // shape.heads))
    if shape.prompts and prompt_k.batch == 0:
        sums = [torch.zeros(parts, *size) if needed else None for needed in needs]
    elif places is None:
        found = [torch.empty(shape.batch, *size, dtype=torch.bfloat16) if needed else None for needed in needs]
    given = tuple(map(Heads.strided, found)) if places is None else places
    call = _Attention(
        *shape, q, k, v, prompt_k, prompt_v, Heads(), lse.data_ptr(), scale, threads, dout, dq, dk, dv, *given,
        *map(pointer, sums), parts, pointer(lengths),
    )  # fmt: skip
    check(_function("backward")(ctypes.byref(call)))
    return tuple(f if s is None else s[0] if parts == 1 else s.sum(0) for f, s in zip(found, sums, strict=True))
