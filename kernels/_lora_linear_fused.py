"""The frozen product with its low-rank terms inside: one kernel forward, one for the input's gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from fastpeft.kernels._matmul import grouped, keep, product, widen


@triton.jit
def _later(
    first, a, b, scale, start, stop, rank, column,
    next_a, next_b, next_scale, next_start, next_stop, next_rank, next_column,
):  # fmt: skip
    """Of two terms, the one in whose columns a tile that begins at `first` may lie."""
    later = first >= next_start
    return (
        tl.where(later, next_a, a),
        tl.where(later, next_b, b),
        tl.where(later, next_scale, scale),
        tl.where(later, next_start, start),
        tl.where(later, next_stop, stop),
        tl.where(later, next_rank, rank),
        tl.where(later, next_column, column),
    )


@triton.jit
def _tile_with_term(
    acc,
    x_ptr,
    x_row,
    rows,
    row_mask,
    weight_ptr,
    weight_row,
    columns,
    column_mask,
    h_ptr,
    first,
    a,
    b,
    scale,
    start,
    rank,
    column,
    K,
    RANKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of y in the columns of a term; the term's first tile keeps h."""
    low = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    acc, low = product(
        acc, low, x_ptr, x_row, rows, row_mask, weight_ptr, 1, weight_row, columns, column_mask,
        a, 1, K, rank, 0, K, True, BLOCK_K, BLOCK_R, EVEN, PRECISION,
    )  # fmt: skip
    if first == start:
        keep(h_ptr, low, rows, row_mask, column, rank, RANKS, BLOCK_R)
    low = (low * scale).to(x_ptr.dtype.element_ty)
    return widen(acc, low, b, 1, rank, rank, columns - start, column_mask, BLOCK_R, PRECISION)


@triton.jit
def lora_linear_forward_fused(
    x_ptr,  # (M, K), row stride x_row
    weight_ptr,  # (N, K), row stride weight_row
    bias_ptr,  # (N,) or None
    y_ptr,  # (M, N)
    h_ptr,  # (M, RANKS)
    a0_ptr,  # (RANK0, K), as are a1_ptr to a3_ptr, in the order of their terms' columns
    a1_ptr,
    a2_ptr,
    a3_ptr,
    b0_ptr,  # (stop0 - start0, RANK0), and so on
    b1_ptr,
    b2_ptr,
    b3_ptr,
    scale0,
    scale1,
    scale2,
    scale3,
    start0,
    start1,
    start2,
    start3,
    stop0,
    stop1,
    stop2,
    stop3,
    M,
    N,
    K,
    x_row,
    weight_row,
    RANK0: tl.constexpr,  # 0: there is no such term
    RANK1: tl.constexpr,
    RANK2: tl.constexpr,
    RANK3: tl.constexpr,
    COLUMN0: tl.constexpr,  # of h, where the term's part begins
    COLUMN1: tl.constexpr,
    COLUMN2: tl.constexpr,
    COLUMN3: tl.constexpr,
    RANKS: tl.constexpr,
    EVERYWHERE: tl.constexpr,  # one term, over all columns
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN: tl.constexpr,  # K is a multiple of BLOCK_K
    PRECISION: tl.constexpr,
):
    """One tile of y, with the term in whose columns it lies, if there is one."""
    tile_m, tile_n = grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), 8)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    first = tile_n * BLOCK_N
    columns = first.to(tl.int64) + tl.arange(0, BLOCK_N)
    column_mask = columns < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if EVERYWHERE:
        acc = _tile_with_term(
            acc, x_ptr, x_row, rows, row_mask, weight_ptr, weight_row, columns, column_mask, h_ptr, first,
            a0_ptr, b0_ptr, scale0, start0, RANK0, COLUMN0, K,
            RANKS, BLOCK_M, BLOCK_K, BLOCK_R, EVEN, PRECISION,
        )  # fmt: skip
    else:
        a, b, scale, start, stop, rank, column = a0_ptr, b0_ptr, scale0, start0, stop0, RANK0, COLUMN0
        if RANK1 > 0:
            a, b, scale, start, stop, rank, column = _later(
                first, a, b, scale, start, stop, rank, column,
                a1_ptr, b1_ptr, scale1, start1, stop1, RANK1, COLUMN1,
            )  # fmt: skip
        if RANK2 > 0:
            a, b, scale, start, stop, rank, column = _later(
                first, a, b, scale, start, stop, rank, column,
                a2_ptr, b2_ptr, scale2, start2, stop2, RANK2, COLUMN2,
            )  # fmt: skip
        if RANK3 > 0:
            a, b, scale, start, stop, rank, column = _later(
                first, a, b, scale, start, stop, rank, column,
                a3_ptr, b3_ptr, scale3, start3, stop3, RANK3, COLUMN3,
            )  # fmt: skip
        if (first >= start) & (first < stop):
            acc = _tile_with_term(
                acc, x_ptr, x_row, rows, row_mask, weight_ptr, weight_row, columns, column_mask, h_ptr, first,
                a, b, scale, start, rank, column, K,
                RANKS, BLOCK_M, BLOCK_K, BLOCK_R, EVEN, PRECISION,
            )  # fmt: skip
        else:
            acc, _ = product(
                acc, acc, x_ptr, x_row, rows, row_mask, weight_ptr, 1, weight_row, columns, column_mask,
                a, 1, K, rank, 0, K, False, BLOCK_K, BLOCK_R, EVEN, PRECISION,
            )  # fmt: skip
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    out = y_ptr + rows[:, None] * N + columns[None, :]
    tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def _segment(
    acc,
    dy_ptr,
    dy_row,
    rows,
    row_mask,
    weight_ptr,
    weight_row,
    columns,
    column_mask,
    g_ptr,
    keeps,
    behind,
    a,
    b,
    scale,
    start,
    stop,
    K,
    RANK: tl.constexpr,
    COLUMN: tl.constexpr,
    RANKS: tl.constexpr,
    KEEP: tl.constexpr,
    EVERYWHERE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + dy[:, behind:stop] W[behind:stop] + g A of the term from start to stop."""
    if not EVERYWHERE:
        acc, _ = product(
            acc, acc, dy_ptr, dy_row, rows, row_mask, weight_ptr, weight_row, 1, columns, column_mask,
            b, RANK, 1, RANK, behind, start, False, BLOCK_K, BLOCK_R, EVEN, PRECISION,
        )  # fmt: skip
    low = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    acc, low = product(
        acc, low, dy_ptr, dy_row, rows, row_mask, weight_ptr, weight_row, 1, columns, column_mask,
        b, RANK, 1, RANK, start, stop, True, BLOCK_K, BLOCK_R, EVEN, PRECISION,
    )  # fmt: skip
    low *= scale
    if KEEP:
        if keeps:
            keep(g_ptr, low, rows, row_mask, COLUMN, RANK, RANKS, BLOCK_R)
    low = low.to(dy_ptr.dtype.element_ty)
    return widen(acc, low, a, K, 1, RANK, columns, column_mask, BLOCK_R, PRECISION)


@triton.jit
def lora_linear_backward_fused(
    dy_ptr,  # (M, N), row stride dy_row
    weight_ptr,  # (N, K), row stride weight_row
    dx_ptr,  # (M, K)
    g_ptr,  # (M, RANKS), or None unless KEEP
    a0_ptr,  # (RANK0, K), as are a1_ptr to a3_ptr, in the order of their terms' columns
    a1_ptr,
    a2_ptr,
    a3_ptr,
    b0_ptr,  # (stop0 - start0, RANK0), and so on
    b1_ptr,
    b2_ptr,
    b3_ptr,
    scale0,
    scale1,
    scale2,
    scale3,
    start0,
    start1,
    start2,
    start3,
    stop0,
    stop1,
    stop2,
    stop3,
    M,
    N,
    K,
    dy_row,
    weight_row,
    RANK0: tl.constexpr,
    RANK1: tl.constexpr,
    RANK2: tl.constexpr,
    RANK3: tl.constexpr,
    COLUMN0: tl.constexpr,
    COLUMN1: tl.constexpr,
    COLUMN2: tl.constexpr,
    COLUMN3: tl.constexpr,
    RANKS: tl.constexpr,
    KEEP: tl.constexpr,  # store g for the factors' gradients
    EVERYWHERE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # columns of dx
    BLOCK_K: tl.constexpr,  # of the sum over dy's columns
    BLOCK_R: tl.constexpr,
    EVEN: tl.constexpr,  # every border of a term and N are multiples of BLOCK_K
    PRECISION: tl.constexpr,
):
    """One tile of dx: the sum over dy's columns goes from term to term, so that one narrow sum is alive at a time."""
    tile_m, tile_n = grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N), 8)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    columns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < K
    keeps = tile_n == 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = _segment(
        acc, dy_ptr, dy_row, rows, row_mask, weight_ptr, weight_row, columns, column_mask, g_ptr, keeps,
        0, a0_ptr, b0_ptr, scale0, start0, stop0, K,
        RANK0, COLUMN0, RANKS, KEEP, EVERYWHERE, BLOCK_M, BLOCK_K, BLOCK_R, EVEN, PRECISION,
    )  # fmt: skip
    behind = stop0
    if RANK1 > 0:
        acc = _segment(
            acc, dy_ptr, dy_row, rows, row_mask, weight_ptr, weight_row, columns, column_mask, g_ptr, keeps,
            behind, a1_ptr, b1_ptr, scale1, start1, stop1, K,
            RANK1, COLUMN1, RANKS, KEEP, EVERYWHERE, BLOCK_M, BLOCK_K, BLOCK_R, EVEN, PRECISION,
        )  # fmt: skip
        behind = stop1
    if RANK2 > 0:
        acc = _segment(
            acc, dy_ptr, dy_row, rows, row_mask, weight_ptr, weight_row, columns, column_mask, g_ptr, keeps,
            behind, a2_ptr, b2_ptr, scale2, start2, stop2, K,
            RANK2, COLUMN2, RANKS, KEEP, EVERYWHERE, BLOCK_M, BLOCK_K, BLOCK_R, EVEN, PRECISION,
        )  # fmt: skip
        behind = stop2
    if RANK3 > 0:
        acc = _segment(
            acc, dy_ptr, dy_row, rows, row_mask, weight_ptr, weight_row, columns, column_mask, g_ptr, keeps,
            behind, a3_ptr, b3_ptr, scale3, start3, stop3, K,
            RANK3, COLUMN3, RANKS, KEEP, EVERYWHERE, BLOCK_M, BLOCK_K, BLOCK_R, EVEN, PRECISION,
        )  # fmt: skip
        behind = stop3
    if not EVERYWHERE:
        acc, _ = product(
            acc, acc, dy_ptr, dy_row, rows, row_mask, weight_ptr, weight_row, 1, columns, column_mask,
            b0_ptr, RANK0, 1, RANK0, behind, N, False, BLOCK_K, BLOCK_R, EVEN, PRECISION,
        )  # fmt: skip
    out = dx_ptr + rows[:, None] * K + columns[None, :]
    tl.store(out, acc.to(dx_ptr.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])
