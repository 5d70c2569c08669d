"""Calls into csrc/cpu/vector: which instruction set's functions, what they are handed, what they cannot take."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastpeft import _native
from fastpeft.native.memory import pool

DTYPES = (torch.float32, torch.bfloat16)
_OUT_OF_RANGE = 2  # csrc/cpu/common.h


def level() -> str:
    """The instruction set to use, one of `fastpeft._native.LEVELS`."""
    return _native.cpu_level()


@functools.cache
def _function(name: str, level: str) -> Callable[[ctypes.c_void_p], int]:
    return _native.function(f"fastpeft_{name}_{level}", ctypes.c_void_p)


def call(name: str, arguments: ctypes.Structure) -> None:
    """Run a function on a structure.

    Raises:
        IndexError: an index among the arguments is out of range; what was to be written holds anything.
        MemoryError: there is none left for its scratch.
    """
    found = level()
    # The matrix unit has functions of its own; these are then what goes with it.
    status = _function(name, "avx512" if found == "amx" else found)(ctypes.addressof(arguments))
    if status == _OUT_OF_RANGE:
        raise IndexError(f"{name} was given an index that is out of range")
    if status:
        raise MemoryError(f"the native library found no memory for {name}")


def empty_like(t: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of another's shape and dtype; a large one in memory kept between steps."""
    return pool.empty(*t.shape, dtype=t.dtype)


def pointer(t: Tensor | None) -> int | None:
    """Where a tensor's numbers begin."""
    return None if t is None else t.data_ptr()


def type_reasons(t: Tensor) -> list[str]:
    """Why the functions cannot take a tensor's dtype or device."""
    found = [] if t.dtype in DTYPES else [f"{t.dtype} is neither float32 nor bfloat16"]
    return found if t.device.type == "cpu" else [*found, f"the tensors are on {t.device}, not on the CPU"]


def form(t: Tensor) -> str:
    """A tensor in words."""
    return f"{tuple(t.shape)} in {t.dtype} on {t.device}"


def side_by_side(t: Tensor) -> bool:
    """Whether the elements of a row lie one after another."""
    return t.stride(-1) == 1 or t.shape[-1] <= 1


def parameter_reasons(name: str, t: Tensor | None, shape: tuple[int, ...], like: Tensor) -> list[str]:
    """Why a parameter does not fit; None always does."""
    if t is None or (t.shape == shape and t.dtype in (like.dtype, torch.float32) and t.device == like.device):
        return []
    return [f"{name} is {form(t)}, not {shape} in {like.dtype} or float32 on {like.device}"]


def in_fp32(t: Tensor | None) -> Tensor | None:
    """A parameter as the functions read it: contiguous and in fp32."""
    return None if t is None else t.detach().float().contiguous()
