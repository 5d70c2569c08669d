"""Activations as blocks of 32 x 32 numbers, the order in which the matrix unit writes and reads them.

A blocked tensor has shape (row blocks, column blocks, 32, 32). Rows that fill the last block up hold anything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft.native.memory import pool

BLOCK = 32


def blocks(count: int) -> int:
    """Blocks that so many rows or columns take."""
    return -(-count // BLOCK)


def empty(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """An uninitialised blocked tensor."""
    return pool.empty(blocks(rows), blocks(columns), BLOCK, BLOCK, dtype=dtype)


def to_rows(x: Tensor, rows: int) -> Tensor:
    """(rows, columns) of a blocked tensor, row after row."""
    return x.transpose(1, 2).reshape(x.shape[0] * BLOCK, x.shape[1] * BLOCK)[:rows]


def from_rows(x: Tensor) -> Tensor:
    """A blocked copy of (rows, columns); columns a multiple of 32, missing rows zero."""
    rows, columns = x.shape
    whole = torch.nn.functional.pad(x, (0, 0, 0, -rows % BLOCK))
    return whole.view(blocks(rows), BLOCK, columns // BLOCK, BLOCK).transpose(1, 2).contiguous()
