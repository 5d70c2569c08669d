"""The tiled matrix product that operators put their own epilogues behind, and the tiles that each chip gets.

    acc (BLOCK_M, BLOCK_N) += left (BLOCK_M, first:last) right (first:last, BLOCK_N)

and, from the same tiles of the left factor, low (BLOCK_M, BLOCK_R) += left factor (first:last, BLOCK_R).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpeft.kernels._compile import SHARED_LIMIT

# Element types of activations and frozen weights.
TYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Tiles:
    """One program's share of an output and of the reduction.

    Attributes:
        m: rows.
        n: columns.
        k: terms of the sum a step.
        warps: of the program.
        stages: of its software pipeline.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int


def precision(dtype: torch.dtype) -> str:
    """How matrix instructions round fp32 operands: as the user lets cuBLAS round them."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def aligned(*tensors: Tensor) -> bool:
    """Whether the rows of the tensors begin at multiples of 16 elements, so that they are loaded 16 bytes at a time."""
    return all(tensor.stride(0) % 16 == 0 for tensor in tensors)


def on_matrix_units(dtype: torch.dtype, capability: int) -> bool:
    """Whether products use matrix instructions: exact fp32 has none, and Triton none for chips before 8.0."""
    return capability >= 80 and (dtype != torch.float32 or precision(dtype) == "tf32")


def type_reasons(dtype: torch.dtype, capability: int) -> list[str]:
    """Why a chip cannot multiply matrices of this type here."""
    if dtype not in TYPES:
        return [f"{dtype} is not one of float16, bfloat16 and float32"]
    if capability < 75:
        return [f"the kernels need compute capability 7.5, the device has {capability / 10:.1f}"]
    if dtype == torch.bfloat16 and capability < 80:
        return [f"bfloat16 needs compute capability 8.0, the device has {capability / 10:.1f}"]
    return []


def choose_tiles(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    capability: int,
    processors: int,
    whole: bool,
    widest: int = 256,
    low: tuple[int, int] = (0, 0),
) -> Tiles:
    """Tiles of a product with a (rows, columns) output.

    Args:
        rows: of the output.
        columns: of the output.
        dtype: of the operands.
        capability: of the chip.
        processors: of the chip; large tiles are chosen where they fill it.
        whole: whether the operands are `aligned`.
        widest: largest number of columns that a tile may have.
        low: columns of a second, narrow right factor and bytes of its elements.
    """
    size, share = dtype.itemsize, _share(low)
    if not on_matrix_units(dtype, capability):
        # The operands of a step pass through registers.
        small = large = Tiles(64 // share, 64 // share, 16, 4, 2)
    elif not whole:
        # Elements that are loaded one by one take an address register each.
        small = large = Tiles(64, 64, 32, 4, 2)
    else:
        small = Tiles(64, 64, 128 // size, 4, 4)
        large = Tiles(128, (256 if capability in (90, 100) and size == 2 else 128) // share, 128 // size, 8, 4)
    filled = -(-rows // large.m) * -(-columns // large.n) >= processors
    return _fitted(large if filled else small, size, capability, widest, low)


def tile_candidates(
    table: Tiles,
    dtype: torch.dtype,
    capability: int,
    whole: bool,
    widest: int = 256,
    low: tuple[int, int] = (0, 0),
) -> list[Tiles]:
    """Tiles that may be faster than the table's, with the arguments of `choose_tiles`; none for what is not `whole`."""
    if not on_matrix_units(dtype, capability) or not whole:
        return []
    size = dtype.itemsize
    step = 128 // size
    wide = 128 // _share(low)
    shapes = [(64, 64, step, 4, 4), (128, 64, step, 8, 3), (128, wide, step // 2, 8, 4), (128, wide, step, 8, 3)]
    if wide > 64:
        shapes.append((64, wide, step, 4, 3))
    if table.n > wide:
        shapes += [(table.m, table.n, step // 2, table.warps, 4)]
    found = [_fitted(Tiles(*shape), size, capability, widest, low) for shape in shapes]
    return [tiles for tiles in dict.fromkeys(found) if tiles != table and tiles.stages > 1]


def _share(low: tuple[int, int]) -> int:
    """What a second sum leaves of the first one's columns, since it takes registers of it."""
    return 2 if low[0] > 16 else 1


def _fitted(tiles: Tiles, size: int, capability: int, widest: int, low: tuple[int, int]) -> Tiles:
    """Tiles no wider than the widest, with the stages for which there is shared memory."""
    n = min(tiles.n, widest)
    step = tiles.k * ((tiles.m + n) * size + low[0] * low[1])
    steps = (SHARED_LIMIT.get(capability, SHARED_LIMIT[75]) - 4096) // step
    # Matrix units that read shared memory hold a step until it is done, others have it in registers by then.
    stages = min(tiles.stages, steps if capability in (90, 100) else steps + 1)
    return Tiles(tiles.m, n, tiles.k, tiles.warps, stages)


@triton.jit
def grouped(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile of a program, in an order in which programs that run at the same time share rows and columns."""
    width = GROUP * tiles_n
    first = program // width * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    inside = program % width
    return first + inside % size, inside // size


@triton.jit
def product(
    acc,  # (BLOCK_M, BLOCK_N) fp32
    low,  # (BLOCK_M, BLOCK_R) fp32; unchanged unless LOW
    left_ptr,  # (rows, columns of the reduction)
    left_row,  # elements from row to row; the reduction lies side by side
    rows,  # (BLOCK_M,) int64
    row_mask,  # (BLOCK_M,)
    right_ptr,  # reduction index k, output column n: at k * right_k + n * right_n
    right_k,
    right_n,
    columns,  # (BLOCK_N,) int64
    column_mask,  # (BLOCK_N,)
    factor_ptr,  # reduction index k, rank j: at (k - first) * factor_k + j * factor_j; read if LOW
    factor_k,
    factor_j,
    rank,
    first,
    last,
    LOW: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN: tl.constexpr,  # last - first is a multiple of BLOCK_K
    PRECISION: tl.constexpr,
):
    """acc + left[:, first:last] right[first:last], and the same with the narrow factor."""
    ks = tl.arange(0, BLOCK_K)
    js = tl.arange(0, BLOCK_R)
    start = tl.cast(first, tl.int64)
    left = left_ptr + start + rows[:, None] * left_row + ks[None, :]
    right = right_ptr + start * right_k + ks[:, None] * right_k + columns[None, :] * right_n
    if LOW:
        factor = factor_ptr + ks[:, None] * factor_k + js[None, :] * factor_j
    for k in range(first, last, BLOCK_K):
        inside = ks < last - k
        x = tl.load(left, mask=row_mask[:, None] if EVEN else row_mask[:, None] & inside[None, :], other=0.0)
        w = tl.load(right, mask=column_mask[None, :] if EVEN else inside[:, None] & column_mask[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        if LOW:
            ranks = (js < rank)[None, :]
            f = tl.load(factor, mask=ranks if EVEN else inside[:, None] & ranks, other=0.0).to(x.dtype)
            low = tl.dot(x, f, low, input_precision=PRECISION)
            factor += BLOCK_K * factor_k
        left += BLOCK_K
        right += BLOCK_K * right_k
    return acc, low


@triton.jit
def narrow(
    low,  # (BLOCK_M, BLOCK_R) fp32
    left_ptr,  # (rows, columns of the reduction)
    left_row,
    rows,  # (BLOCK_M,) int64
    row_mask,  # (BLOCK_M,)
    factor_ptr,  # reduction index k, rank j: at (k - first) * factor_k + j * factor_j
    factor_k,
    factor_j,
    rank,
    first,
    last,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """low + left[:, first:last] factor."""
    ks = tl.arange(0, BLOCK_K)
    js = tl.arange(0, BLOCK_R)
    left = left_ptr + tl.cast(first, tl.int64) + rows[:, None] * left_row + ks[None, :]
    factor = factor_ptr + ks[:, None] * factor_k + js[None, :] * factor_j
    for k in range(first, last, BLOCK_K):
        inside = ks < last - k
        x = tl.load(left, mask=row_mask[:, None] & inside[None, :], other=0.0)
        f = tl.load(factor, mask=inside[:, None] & (js < rank)[None, :], other=0.0).to(x.dtype)
        low = tl.dot(x, f, low, input_precision=PRECISION)
        left += BLOCK_K
        factor += BLOCK_K * factor_k
    return low


@triton.jit
def widen(
    acc,  # (BLOCK_M, BLOCK_N) fp32
    low,  # (BLOCK_M, BLOCK_R), of the operands' type
    factor_ptr,  # rank j, column n: at j * factor_j + n * factor_n
    factor_j,
    factor_n,
    rank,
    columns,  # (BLOCK_N,)
    column_mask,  # (BLOCK_N,)
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + low factor."""
    js = tl.arange(0, BLOCK_R)
    factor = factor_ptr + js[:, None] * factor_j + columns[None, :] * factor_n
    f = tl.load(factor, mask=(js < rank)[:, None] & column_mask[None, :], other=0.0).to(low.dtype)
    return tl.dot(low, f, acc, input_precision=PRECISION)


@triton.jit
def keep(
    low_ptr,  # (M, RANKS)
    low,  # (BLOCK_M, BLOCK_R) fp32
    rows,  # (BLOCK_M,) int64
    row_mask,
    column,
    rank,
    RANKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Store a narrow product in the `rank` columns from `column` on."""
    js = tl.arange(0, BLOCK_R)
    out = low_ptr + rows[:, None] * RANKS + column + js[None, :]
    tl.store(out, low.to(low_ptr.dtype.element_ty), mask=row_mask[:, None] & (js < rank)[None, :])
