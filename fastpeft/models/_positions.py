"""Position tables at another resolution than they were trained at."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from fastpeft.errors import FastPEFTError

POS_RESIZE_MODES = ("bicubic", "vpt")


def resample_positions(model: nn.Module, table: torch.Tensor, mode: str, label: str) -> torch.Tensor:
    """Bring a checkpoint's position table to the model's grid.

    Args:
        model: A timm vision transformer; its grid may be oblong, the table's is square.
        table: (1, prefix rows + grid rows, width), the prefix being the class token and its like.
        mode: `bicubic` (antialiased when shrinking), or `vpt`: linear between the corners, as `scipy.ndimage.zoom` of
            order 1 does.
        label: The checkpoint's name for errors.

    Returns:
        A table of the model's shape, or the table itself where nothing is to do.
    """
    if mode not in POS_RESIZE_MODES:
        raise FastPEFTError(f"pos_resize: expected one of {', '.join(POS_RESIZE_MODES)}, got '{mode}'")
    wanted = model.pos_embed.shape
    if table.shape == wanted:
        return table
    prefix = wanted[1] - model.patch_embed.num_patches
    side = math.isqrt(max(table.shape[1] - prefix, 0))
    if table.ndim != 3 or side == 0 or side * side != table.shape[1] - prefix or table.shape[2] != wanted[2]:
        raise FastPEFTError(
            f"{label}: pos_embed has shape {tuple(table.shape)}; expected (1, {prefix} + a square number, {wanted[2]})"
        )
    grid = table[:, prefix:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if mode == "vpt":
        grid = F.interpolate(grid, model.patch_embed.grid_size, mode="bilinear", align_corners=True)
    else:
        grid = F.interpolate(grid, model.patch_embed.grid_size, mode="bicubic", antialias=True)
    return torch.cat([table[:, :prefix], grid.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)
