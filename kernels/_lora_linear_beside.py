"""Low-rank terms added in place to a frozen product, and the sums over rows that are their factors' gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from fastpeft.kernels._matmul import keep, narrow, widen


@triton.jit
def _add_in_place(
    y_ptr,
    y_row,
    h_ptr,
    rows,
    row_mask,
    low,
    b,
    scale,
    start,
    stop,
    part,
    parts,
    RANK: tl.constexpr,
    COLUMN: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keep h and add scale h B^T into this program's share of the term's columns."""
    if part == 0:
        keep(h_ptr, low, rows, row_mask, COLUMN, RANK, RANKS, BLOCK_R)
    low = (low * scale).to(y_ptr.dtype.element_ty)
    for n in range(start + part * BLOCK_N, stop, parts * BLOCK_N):
        columns = n + tl.arange(0, BLOCK_N)
        column_mask = columns < stop
        mask = row_mask[:, None] & column_mask[None, :]
        out = y_ptr + rows[:, None] * y_row + columns[None, :]
        acc = tl.load(out, mask=mask, other=0.0).to(tl.float32)
        acc = widen(acc, low, b, 1, RANK, RANK, columns - start, column_mask, BLOCK_R, PRECISION)
        tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def lora_linear_forward_beside(
    x_ptr,  # (M, K), row stride x_row
    y_ptr,  # (M, N), row stride y_row; holds x W^T + b
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
    K,
    x_row,
    y_row,
    RANK0: tl.constexpr,  # 0: there is no such term
    RANK1: tl.constexpr,
    RANK2: tl.constexpr,
    RANK3: tl.constexpr,
    COLUMN0: tl.constexpr,  # of h, where the term's part begins
    COLUMN1: tl.constexpr,
    COLUMN2: tl.constexpr,
    COLUMN3: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block of rows: h of all terms from one pass over x, then this program's share of the columns."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    part, parts = tl.program_id(1), tl.num_programs(1)
    ks = tl.arange(0, BLOCK_K)
    js = tl.arange(0, BLOCK_R)
    x = x_ptr + rows[:, None] * x_row + ks[None, :]
    factor = js[None, :] * K + ks[:, None]
    low0 = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    low1 = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    low2 = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    low3 = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = ks < K - k
        tile = tl.load(x + k, mask=row_mask[:, None] & inside[None, :], other=0.0)
        f = tl.load(a0_ptr + k + factor, mask=inside[:, None] & (js < RANK0)[None, :], other=0.0)
        low0 = tl.dot(tile, f.to(tile.dtype), low0, input_precision=PRECISION)
        if RANK1 > 0:
            f = tl.load(a1_ptr + k + factor, mask=inside[:, None] & (js < RANK1)[None, :], other=0.0)
            low1 = tl.dot(tile, f.to(tile.dtype), low1, input_precision=PRECISION)
        if RANK2 > 0:
            f = tl.load(a2_ptr + k + factor, mask=inside[:, None] & (js < RANK2)[None, :], other=0.0)
            low2 = tl.dot(tile, f.to(tile.dtype), low2, input_precision=PRECISION)
        if RANK3 > 0:
            f = tl.load(a3_ptr + k + factor, mask=inside[:, None] & (js < RANK3)[None, :], other=0.0)
            low3 = tl.dot(tile, f.to(tile.dtype), low3, input_precision=PRECISION)
    _add_in_place(
        y_ptr, y_row, h_ptr, rows, row_mask, low0, b0_ptr, scale0, start0, stop0, part, parts,
        RANK0, COLUMN0, RANKS, BLOCK_N, BLOCK_R, PRECISION,
    )  # fmt: skip
    if RANK1 > 0:
        _add_in_place(
            y_ptr, y_row, h_ptr, rows, row_mask, low1, b1_ptr, scale1, start1, stop1, part, parts,
            RANK1, COLUMN1, RANKS, BLOCK_N, BLOCK_R, PRECISION,
        )  # fmt: skip
    if RANK2 > 0:
        _add_in_place(
            y_ptr, y_row, h_ptr, rows, row_mask, low2, b2_ptr, scale2, start2, stop2, part, parts,
            RANK2, COLUMN2, RANKS, BLOCK_N, BLOCK_R, PRECISION,
        )  # fmt: skip
    if RANK3 > 0:
        _add_in_place(
            y_ptr, y_row, h_ptr, rows, row_mask, low3, b3_ptr, scale3, start3, stop3, part, parts,
            RANK3, COLUMN3, RANKS, BLOCK_N, BLOCK_R, PRECISION,
        )  # fmt: skip


@triton.jit
def _gradient_low(
    dy_ptr,
    dy_row,
    g_ptr,
    rows,
    row_mask,
    b,
    scale,
    start,
    stop,
    part,
    RANK: tl.constexpr,
    COLUMN: tl.constexpr,
    RANKS: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """g = scale dy[:, start:stop] B of one term, kept by the first program of the rows."""
    low = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    low = narrow(low, dy_ptr, dy_row, rows, row_mask, b, RANK, 1, RANK, start, stop, BLOCK_K, BLOCK_R, PRECISION)
    low *= scale
    if KEEP:
        if part == 0:
            keep(g_ptr, low, rows, row_mask, COLUMN, RANK, RANKS, BLOCK_R)
    return low.to(dy_ptr.dtype.element_ty)


@triton.jit
def lora_linear_backward_beside(
    dy_ptr,  # (M, N), row stride dy_row
    dx_ptr,  # (M, K), holds dy W; None unless ADD
    g_ptr,  # (M, RANKS); None unless KEEP
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
    K,
    dy_row,
    RANK0: tl.constexpr,
    RANK1: tl.constexpr,
    RANK2: tl.constexpr,
    RANK3: tl.constexpr,
    COLUMN0: tl.constexpr,
    COLUMN1: tl.constexpr,
    COLUMN2: tl.constexpr,
    COLUMN3: tl.constexpr,
    RANKS: tl.constexpr,
    ADD: tl.constexpr,  # dx is asked for
    KEEP: tl.constexpr,  # store g for the factors' gradients
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block of rows: g of all terms, then g A added into this program's share of dx's columns."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    part, parts = tl.program_id(1), tl.num_programs(1)
    low0 = _gradient_low(
        dy_ptr, dy_row, g_ptr, rows, row_mask, b0_ptr, scale0, start0, stop0, part,
        RANK0, COLUMN0, RANKS, KEEP, BLOCK_M, BLOCK_K, BLOCK_R, PRECISION,
    )  # fmt: skip
    if RANK1 > 0:
        low1 = _gradient_low(
            dy_ptr, dy_row, g_ptr, rows, row_mask, b1_ptr, scale1, start1, stop1, part,
            RANK1, COLUMN1, RANKS, KEEP, BLOCK_M, BLOCK_K, BLOCK_R, PRECISION,
        )  # fmt: skip
    if RANK2 > 0:
        low2 = _gradient_low(
            dy_ptr, dy_row, g_ptr, rows, row_mask, b2_ptr, scale2, start2, stop2, part,
            RANK2, COLUMN2, RANKS, KEEP, BLOCK_M, BLOCK_K, BLOCK_R, PRECISION,
        )  # fmt: skip
    if RANK3 > 0:
        low3 = _gradient_low(
            dy_ptr, dy_row, g_ptr, rows, row_mask, b3_ptr, scale3, start3, stop3, part,
            RANK3, COLUMN3, RANKS, KEEP, BLOCK_M, BLOCK_K, BLOCK_R, PRECISION,
        )  # fmt: skip
    if ADD:
        for n in range(part * BLOCK_N, K, parts * BLOCK_N):
            columns = n + tl.arange(0, BLOCK_N)
            column_mask = columns < K
            mask = row_mask[:, None] & column_mask[None, :]
            out = dx_ptr + rows[:, None] * K + columns[None, :]
            acc = tl.load(out, mask=mask, other=0.0).to(tl.float32)
            acc = widen(acc, low0, a0_ptr, K, 1, RANK0, columns, column_mask, BLOCK_R, PRECISION)
            if RANK1 > 0:
                acc = widen(acc, low1, a1_ptr, K, 1, RANK1, columns, column_mask, BLOCK_R, PRECISION)
            if RANK2 > 0:
                acc = widen(acc, low2, a2_ptr, K, 1, RANK2, columns, column_mask, BLOCK_R, PRECISION)
            if RANK3 > 0:
                acc = widen(acc, low3, a3_ptr, K, 1, RANK3, columns, column_mask, BLOCK_R, PRECISION)
            tl.store(out, acc.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def lora_linear_factors(
    x_ptr,  # (M, K), row stride x_row
    dy_ptr,  # (M, N), row stride dy_row
    h_ptr,  # (M, RANKS)
    g_ptr,  # (M, RANKS)
    sums_ptr,  # (splits, total) fp32: dA of all terms (RANKS, K), then dB_t (stop_t - start_t, RANK_t) from base_t on
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
    base0,
    base1,
    base2,
    base3,
    tile0,  # number of the first tile of dB_0, behind those of dA
    tile1,
    tile2,
    tile3,
    M,
    K,
    x_row,
    dy_row,
    total,
    split_rows,
    RANK0: tl.constexpr,
    RANK1: tl.constexpr,
    RANK2: tl.constexpr,
    RANK3: tl.constexpr,
    COLUMN0: tl.constexpr,
    COLUMN1: tl.constexpr,
    COLUMN2: tl.constexpr,
    COLUMN3: tl.constexpr,
    RANKS: tl.constexpr,
    TOGETHER: tl.constexpr,  # a tile of x serves dA of all terms
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Columns of x times g, or columns of dy times h, summed over one split of the rows."""
    tile, split = tl.program_id(0), tl.program_id(1)
    tiles_k = tl.cdiv(K, BLOCK_C)
    of_x = tile < tile0
    term = tl.where(of_x, tile // tiles_k, 0)
    scale, start, stop, base, first_tile, rank, column = scale0, start0, stop0, base0, tile0, RANK0, COLUMN0
    if RANK1 > 0:
        term = tl.where(of_x, term, (tile >= tile1).to(tl.int32))
        later = term >= 1
        scale, start, stop = (
            tl.where(later, scale1, scale),
            tl.where(later, start1, start),
            tl.where(later, stop1, stop),
        )
        base, first_tile = tl.where(later, base1, base), tl.where(later, tile1, first_tile)
        rank, column = tl.where(later, RANK1, rank), tl.where(later, COLUMN1, column)
    if RANK2 > 0:
        term = tl.where(of_x, term, term + (tile >= tile2).to(tl.int32))
        later = term >= 2
        scale, start, stop = (
            tl.where(later, scale2, scale),
            tl.where(later, start2, start),
            tl.where(later, stop2, stop),
        )
        base, first_tile = tl.where(later, base2, base), tl.where(later, tile2, first_tile)
        rank, column = tl.where(later, RANK2, rank), tl.where(later, COLUMN2, column)
    if RANK3 > 0:
        term = tl.where(of_x, term, term + (tile >= tile3).to(tl.int32))
        later = term >= 3
        scale, start, stop = (
            tl.where(later, scale3, scale),
            tl.where(later, start3, start),
            tl.where(later, stop3, stop),
        )
        base, first_tile = tl.where(later, base3, base), tl.where(later, tile3, first_tile)
        rank, column = tl.where(later, RANK3, rank), tl.where(later, COLUMN3, column)
    if TOGETHER:
        rank, column = tl.where(of_x, RANKS, rank), tl.where(of_x, 0, column)
    # dA lies with its rank first, dB with its rank last.
    left, left_row = tl.where(of_x, x_ptr, dy_ptr), tl.where(of_x, x_row, dy_row)
    low = tl.where(of_x, g_ptr, h_ptr)
    first, width = tl.where(of_x, 0, start), tl.where(of_x, K, stop - start)
    scale = tl.where(of_x, 1.0, scale)
    base = tl.where(of_x, column * K, base)
    step_c, step_j = tl.where(of_x, 1, rank), tl.where(of_x, K, 1)
    block = tl.where(of_x, tile % tiles_k, tile - first_tile)

    cs = block * BLOCK_C + tl.arange(0, BLOCK_C)
    js = tl.arange(0, BLOCK_R)
    c_mask, j_mask = cs < width, js < rank
    begin = split.to(tl.int64) * split_rows
    end = tl.minimum(begin + split_rows, M)
    rows = begin + tl.arange(0, BLOCK_M)
    left = left + rows[:, None] * left_row + first + cs[None, :]
    low = low + rows[:, None] * RANKS + column + js[None, :]
    acc = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
    for _ in range(begin, end, BLOCK_M):
        row_mask = rows < end
        wide = tl.load(left, mask=row_mask[:, None] & c_mask[None, :], other=0.0)
        thin = tl.load(low, mask=row_mask[:, None] & j_mask[None, :], other=0.0)
        acc = tl.dot(tl.trans(wide), thin, acc, input_precision=PRECISION)
        rows += BLOCK_M
        left += BLOCK_M * left_row
        low += BLOCK_M * RANKS
    out = sums_ptr + split.to(tl.int64) * total + base + cs[:, None] * step_c + js[None, :] * step_j
    tl.store(out, acc * scale, mask=c_mask[:, None] & j_mask[None, :])
