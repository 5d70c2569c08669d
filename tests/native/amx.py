"""What the tests of the matrix unit share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastpeft import _native
from fastpeft.native import blocked

needs_amx = pytest.mark.skipif(
    "amx" not in _native.LEVELS or _native.cpu_level() != "amx", reason=f"this CPU runs {_native.cpu_level()}, not AMX"
)

BF16 = torch.bfloat16


def both_layouts(x: Tensor) -> dict[str, Tensor]:
    """A matrix row-major and blocked, with what nobody may read around it: gaps between rows, rows behind the last."""
    rows, columns = x.shape
    wide = torch.full((rows, columns + 32), float("nan"), dtype=x.dtype)
    wide[:, :columns] = x
    filled = blocked.from_rows(x)
    if rows % blocked.BLOCK:
        filled[-1, :, rows % blocked.BLOCK :] = float("nan")
    return {"row-major": wide[:, :columns], "blocked": filled}


def outputs(rows: int, columns: int) -> dict[str, Tensor]:
    """Poisoned memory for a result, in both layouts."""
    filled = blocked.empty(rows, columns)
    return {
        "row-major": torch.full((rows, columns + 32), float("nan"), dtype=BF16)[:, :columns],
        "blocked": filled.fill_(float("nan")),
    }


def as_rows(t: Tensor, rows: int) -> Tensor:
    """A result as (rows, columns), whichever its layout."""
    return blocked.to_rows(t, rows) if t.dim() == 4 else t
