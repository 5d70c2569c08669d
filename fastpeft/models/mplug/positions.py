"""The image tower's position table at another image size, as the published model is fine-tuned."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpeft.errors import FastPEFTError


def resize_positions(table: Tensor, side: int, label: str) -> Tensor:
    """Bilinear between cell centres, not antialiased; the class token's row stays as it is.

    Args:
        table: (1, 1 + n^2, D), the class token first, then the rows of a square grid, row by row.
        side: patches a side of the new grid.
        label: the table's name for errors.

    Returns:
        (1, 1 + side^2, D); the table itself where that is its size.

    Raises:
        FastPEFTError: the table is not of a square grid.
    """
    if table.ndim != 3 or table.shape[0] != 1 or math.isqrt(max(table.shape[1] - 1, 0)) ** 2 != table.shape[1] - 1:
        raise FastPEFTError(f"{label} has shape {tuple(table.shape)}, expected 1 + a square number of rows")
    before = math.isqrt(table.shape[1] - 1)
    if before == 0:
        raise FastPEFTError(f"{label} has shape {tuple(table.shape)}, expected rows beside the class token's")
    if before == side:
        return table
    grid = table[:, 1:].float().reshape(1, before, before, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (side, side), mode="bilinear", align_corners=False)
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2).to(table.dtype)], 1)
