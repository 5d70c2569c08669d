"""What prompt_attention's kernels are launched with: tiles of the head dimension, blocks, warps and stages."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
from torch import Tensor


class Blocks(NamedTuple):
    """Rows and keys of a program's block, warps, and stages of the pipeline."""

    m: int
    n: int
    warps: int
    stages: int


def widths(width: int) -> tuple[int, int]:
    """Columns of the two tiles that hold a head dimension, the second 0 where one tile is not wider than two."""
    padded = max(16, triton.next_power_of_2(width))
    main = padded // 2
    rest = max(16, triton.next_power_of_2(width - main))
    return (main, rest) if main >= 16 and main + rest < padded else (padded, 0)


def choose(kernel: str, values: dict[str, Any], q: Tensor) -> Blocks:
    return Blocks(64, 64, 4, 2)
