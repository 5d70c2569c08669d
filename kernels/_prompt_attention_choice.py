"""What prompt_attention's kernels are launched with: tiles of the head dimension, blocks, warps and stages.

The tables were filled with the assembler's report (registers without spills, programs that fit on a multiprocessor);
no time was measured for them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastpeft.kernels._compile import SHARED_LIMIT
from fastpeft.kernels._launch import capability_of, processors_of
from fastpeft.kernels._tune import rounded


class Blocks(NamedTuple):
    """What a program works on, and how.

    Attributes:
        m: queries of a block.
        n: keys of a block.
        warps: of a program.
        stages: of the software pipeline.
    """

    m: int
    n: int
    warps: int
    stages: int


# By kernel: blocks for head dimensions up to 64, 96 and 128.
_Table = dict[str, tuple[Blocks, Blocks, Blocks]]
_WIDTHS = (64, 96, 128)

# Matrix instructions of a warp, operands in registers: sm_80 and its kin, with 99 KiB of shared memory at least.
_WARP: _Table = {
    "forward": (Blocks(64, 64, 4, 3), Blocks(64, 32, 4, 3), Blocks(64, 32, 4, 2)),
    "queries": (Blocks(64, 32, 4, 2), Blocks(64, 32, 4, 2), Blocks(64, 64, 8, 2)),
    "keys": (Blocks(32, 64, 4, 2), Blocks(32, 64, 4, 2), Blocks(64, 64, 8, 2)),
    "prompts": (Blocks(64, 64, 4, 2), Blocks(32, 64, 4, 2), Blocks(32, 64, 8, 2)),
}
# Matrix instructions of four warps, operands in shared memory: sm_90 and sm_100.
_GROUP: _Table = {
    "forward": (Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2)),
    "queries": (Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 2)),
    "keys": (Blocks(64, 64, 4, 2), Blocks(32, 64, 4, 2), Blocks(64, 64, 8, 2)),
    "prompts": (Blocks(64, 64, 4, 2), Blocks(32, 64, 4, 2), Blocks(32, 64, 8, 2)),
}
# sm_75: 64 KiB of shared memory and no asynchronous copies.
_OLD: _Table = {
    "forward": (Blocks(64, 32, 4, 1), Blocks(64, 32, 4, 1), Blocks(32, 32, 4, 1)),
    "queries": (Blocks(64, 32, 4, 1), Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1)),
    "keys": (Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1)),
    "prompts": (Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1), Blocks(32, 32, 4, 1)),
}
# fp32 without matrix instructions keeps whole rows of its operands in registers.
_EXACT: _Table = {
    "forward": (Blocks(32, 32, 4, 2), Blocks(32, 16, 4, 2), Blocks(16, 16, 4, 2)),
    "queries": (Blocks(32, 32, 4, 2), Blocks(32, 16, 4, 2), Blocks(32, 16, 4, 2)),
    "keys": (Blocks(16, 32, 4, 2), Blocks(16, 16, 4, 2), Blocks(16, 16, 4, 2)),
    "prompts": (Blocks(32, 32, 4, 2), Blocks(16, 32, 4, 2), Blocks(16, 32, 4, 2)),
}
# fp32 on the matrix units.
_TF32: _Table = {
    "forward": (Blocks(64, 32, 4, 2), Blocks(64, 32, 4, 2), Blocks(64, 32, 8, 2)),
    "queries": (Blocks(64, 32, 4, 2), Blocks(64, 32, 8, 2), Blocks(64, 32, 8, 2)),
    "keys": (Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 2), Blocks(32, 32, 8, 2)),
    "prompts": (Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 2), Blocks(32, 32, 8, 2)),
}

# Queries, keys and warps to measure besides the tables', for head dimensions up to 64 and 96, of 2-byte formats,
# without dropout and without a bias a score. None of them spills on sm_80, sm_90 or sm_100.
_Shapes = tuple[tuple[int, int, int], ...]
_ALSO: dict[str, tuple[_Shapes, _Shapes]] = {
    "forward": (
        ((128, 64, 8), (64, 32, 4), (128, 32, 8), (64, 128, 8)),
        ((64, 32, 4), (128, 64, 8), (128, 32, 8)),
    ),
    "queries": (
        ((64, 32, 4), (64, 64, 8), (128, 32, 8)),
        ((64, 32, 4),),
    ),
    "keys": (
        ((32, 64, 4), (64, 64, 8), (32, 128, 8)),
        ((32, 64, 4), (64, 64, 8)),
    ),
    "prompts": (
        ((32, 64, 4), (64, 64, 8), (64, 32, 4)),
        ((32, 64, 8), (32, 32, 4)),
    ),
}


def widths(width: int) -> tuple[int, int]:
    """Columns of the two tiles that hold a head dimension, the second 0 where one tile is not wider than two."""
    padded = max(16, triton.next_power_of_2(width))
    main = padded // 2
    rest = max(16, triton.next_power_of_2(width - main))
    return (main, rest) if main >= 16 and main + rest < padded else (padded, 0)


def tail(rest: int, block: int) -> int:
    """Block size for what whole blocks leave: the smallest that holds it at once, else as the others."""
    return min(block, max(16, triton.next_power_of_2(rest)))


def choose(kernel: str, values: dict[str, Any], q: Tensor) -> Blocks:
    """Blocks of a kernel of these arguments.

    Args:
        kernel: "forward", "queries", "keys" or "prompts".
        values: arguments by name.
        q: (B, H, Nq, D).
    """
    capability = capability_of(q.device)
    width = values["MAIN"] + values["REST"]
    if q.dtype == torch.float32:
        table = _EXACT if values["PRECISION"] == "ieee" or capability < 80 else _TF32
    elif capability < 80:
        table = _OLD
    else:
        table = _GROUP if 90 <= capability < 120 else _WARP
    blocks = next(row for row, limit in zip(table[kernel], _WIDTHS, strict=True) if width <= limit)
    if values["DROPOUT"] or values["BIAS"] == 1:
        # More numbers a score: fewer scores at once.
        blocks = (
            blocks._replace(m=min(blocks.m, 32))
            if kernel in ("keys", "prompts")
            else blocks._replace(n=min(blocks.n, 32), warps=8 if width > 96 and table is not _EXACT else blocks.warps)
        )
    elif kernel == "forward" and table is _GROUP and _fills(values, processors_of(q.device)):
        blocks = blocks._replace(m=128, warps=8)
    return _fitted(kernel, values, blocks)


def candidates(kernel: str, values: dict[str, Any], q: Tensor) -> list[Blocks]:
    """Blocks that may be faster than those that `choose` gives for the same arguments.

    None for exact fp32 and for compute capability 7.5. Where dropout, a bias or a wide head takes registers, fewer
    stages are all that is left.
    """
    capability = capability_of(q.device)
    if capability < 80 or (q.dtype == torch.float32 and values["PRECISION"] == "ieee"):
        return []
    table = choose(kernel, values, q)
    width = values["MAIN"] + values["REST"]
    if values["DROPOUT"] or values["BIAS"] == 1 or width > _WIDTHS[1] or q.dtype == torch.float32:
        found = [table._replace(stages=table.stages - 1)] if table.stages > 1 else []
    else:
        # With fewer stages than the table's, the gradients of prompts spill.
        stages = (table.stages + 1,) if kernel == "prompts" else (table.stages - 1, table.stages + 1)
        found = [table._replace(stages=count) for count in stages if count >= 1]
        found += [_fitted(kernel, values, Blocks(*shape, 2)) for shape in _ALSO[kernel][width > _WIDTHS[0]]]
    limit = SHARED_LIMIT.get(capability, SHARED_LIMIT[75]) - 4096
    return [blocks for blocks in found if _shared_bytes(kernel, blocks, values, q) <= limit]


def _shared_bytes(kernel: str, blocks: Blocks, values: dict[str, Any], q: Tensor) -> int:
    """Bytes of the rows that a program holds, and of those that it walks over, once a stage; two tensors of each."""
    held, walked = (blocks.m, blocks.n) if kernel in ("forward", "queries") else (blocks.n, blocks.m)
    return 2 * (held + blocks.stages * walked) * (values["MAIN"] + values["REST"]) * q.element_size()


def key(values: dict[str, Any], q: Tensor, *flags: str) -> dict[str, object]:
    """Class of a launch; `flags` name arguments that this kernel is compiled for besides those of all."""
    found: dict[str, object] = {
        "heads": rounded(values["B"] * values["H"]),
        "queries": rounded(values["Nq"]),
        "tokens": rounded(values["N"]),
        "prompts": rounded(values["P"]),
        "width": values["D"],
        "dtype": q.dtype,
        "aligned": all(values[f"{name}_n"] % 8 == 0 for name in ("q", "k", "v")),
    }
    common = ("BIAS", "CAUSAL", "DROPOUT", "PROMPTS", "SHARED", "BANK", "PRECISION")
    return found | {name.lower(): values[name] for name in (*common, *flags)}


def _fitted(kernel: str, values: dict[str, Any], blocks: Blocks) -> Blocks:
    """Blocks no larger than what there is to be divided."""
    keys = values["P"] if kernel == "prompts" else values["N"]
    if kernel in ("forward", "queries"):
        keys += values["P"]
    rows = values["Nq"] * (values["B"] if kernel == "prompts" and values["SHARED"] else 1)
    m, n = tail(rows, blocks.m), tail(keys, blocks.n)
    return Blocks(m, n, 4 if m * n < blocks.m * blocks.n // 2 else blocks.warps, blocks.stages)


def _fills(values: dict[str, Any], processors: int) -> bool:
    """Whether blocks of 128 queries leave no more rows idle than blocks of 64, and no processor."""
    blocks = triton.cdiv(values["Nq"], 128)
    return 2 * blocks == triton.cdiv(values["Nq"], 64) and values["B"] * values["H"] * blocks >= 2 * processors
