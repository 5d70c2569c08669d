"""The forward kernel of prompt_attention, and the pieces that the backward kernels share with it.

    s_ij = scale * q_i k_j + bias_ij,   lse_i = log sum_j exp(s_ij),   P_ij = exp(s_ij - lse_i),
    out_i = sum_j P_ij M_ij v_j

j runs over the N tokens and then over the p prompts; M is the dropout mask. One program owns a block of queries of one
head and passes over the keys with a running maximum and sum. Whole blocks of tokens come first and need no mask. The
rest of the tokens and the prompts follow as one sequence, in blocks of their own size of which one may hold both: 197
tokens and 10 prompts are three blocks of 64 keys and one of 16.

A head dimension that is no power of two is two tiles, MAIN and REST columns wide: 80 costs 64 + 16 and not 128.
Exponentials are powers of two: log2(e) is folded into the scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Arguments that a kernel is not compiled anew for when they become 1 or divisible by 16.
COUNTS = ("B", "H", "Nq", "N", "P", "G", "splits", "threshold")


@triton.jit
def kept(rows, columns, threshold):
    """Dropout's decision of fastpeft/ops/dropout_mask.py for broadcast int32 words of rows and columns."""
    z = (rows ^ columns) * 0x7FEB352D
    # The masks take back the sign that an arithmetic shift drags along.
    z = z ^ ((z >> 15) & 0x1FFFF)
    # 0x846CA68B as a signed number.
    z = z * -2073254261
    z = z ^ ((z >> 16) & 0xFFFF)
    return z >= threshold


@triton.jit
def key_rows(tokens, token_stride, prompts, prompt_stride, keys, N, MIXED: tl.constexpr):
    """Pointers to the rows of keys (or values); behind the N tokens come the prompts if MIXED."""
    rows = tokens + keys.to(tl.int64) * token_stride
    if MIXED:
        rows = tl.where(keys < N, rows, prompts + (keys - N).to(tl.int64) * prompt_stride)
    return rows


@triton.jit
def load_tile(rows, inside, COLUMN: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """WIDTH columns from COLUMN on of the rows that the pointers show; 0 beyond D and, if MASKED, not inside."""
    columns = COLUMN + tl.arange(0, WIDTH)
    pointers = rows[:, None] + columns[None, :]
    if COLUMN + WIDTH > D:
        if MASKED:
            tile = tl.load(pointers, mask=inside[:, None] & (columns < D)[None, :], other=0.0)
        else:
            tile = tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    elif MASKED:
        tile = tl.load(pointers, mask=inside[:, None], other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(rows, inside, tile, COLUMN: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """The other way round: WIDTH columns from COLUMN on of the rows inside."""
    columns = COLUMN + tl.arange(0, WIDTH)
    mask = inside[:, None] & (columns < D)[None, :]
    tl.store(rows[:, None] + columns[None, :], tile.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def load_bias(bias, bias_m, bias_n, rows, keys, Nq, N, BIAS: tl.constexpr):
    """Bias in units of log2 for rows x keys, both broadcast to two dimensions; 0 for what is no token.

    BIAS is 1 where it depends on query and key, 2 where every query has the same, which is then read once a key.
    """
    if BIAS == 2:
        tile = tl.load(bias + keys.to(tl.int64) * bias_n, mask=keys < N, other=0.0)
    else:
        pointers = bias + rows.to(tl.int64) * bias_m + keys.to(tl.int64) * bias_n
        tile = tl.load(pointers, mask=(rows < Nq) & (keys < N), other=0.0)
    return tile.to(tl.float32) * LOG2E


@triton.jit
def prompt_offset(b, h, index, stride_b, stride_h, BANK: tl.constexpr):
    """Offset of the prompts of a sample and head; stride_b is 0 where the batch shares them."""
    group = b
    if BANK:
        group = tl.load(index + b).to(tl.int64)
    return group * stride_b + h * stride_h


@triton.jit
def _attend(
    acc,
    acc_rest,
    top,
    total,
    q,
    q_rest,
    k_ptr,
    v_ptr,
    prompt_k_ptr,
    prompt_v_ptr,
    bias_ptr,
    row_words,
    column_words_ptr,
    k_n,
    v_n,
    prompt_k_n,
    prompt_v_n,
    bias_m,
    bias_n,
    rows,
    start,
    stop,
    Nq,
    N,
    scale_log2,
    threshold,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    TAIL: tl.constexpr,
    PROMPTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Pass over keys start to stop. TAIL: the last block is ragged, and with PROMPTS keys from N on are prompts."""
    for first in range(start, stop, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        inside = keys < stop
        k_rows = key_rows(k_ptr, k_n, prompt_k_ptr, prompt_k_n, keys, N, TAIL and PROMPTS)
        v_rows = key_rows(v_ptr, v_n, prompt_v_ptr, prompt_v_n, keys, N, TAIL and PROMPTS)
        k = load_tile(k_rows, inside, 0, MAIN, D, TAIL)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if REST > 0:
            k_rest = load_tile(k_rows, inside, MAIN, REST, D, TAIL)
            s = tl.dot(q_rest, tl.trans(k_rest), s, input_precision=PRECISION)
        if CAUSAL:
            seen = keys[None, :] <= rows[:, None]
            if TAIL:
                if PROMPTS:
                    seen = seen | (keys >= N)[None, :]
                seen = seen & inside[None, :]
            s = tl.where(seen, s, float("-inf"))
        elif TAIL:
            s = tl.where(inside[None, :], s, float("-inf"))
        if BIAS > 0:
            s = s * scale_log2 + load_bias(bias_ptr, bias_m, bias_n, rows[:, None], keys[None, :], Nq, N, BIAS)
            new_top = tl.maximum(top, tl.max(s, 1))
            # A row that has seen no key yet must not compute inf - inf.
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(s - base[:, None])
        else:
            # The scale is positive, so that it may be applied to the maximum alone and inside the exponent.
            new_top = tl.maximum(top, tl.max(s, 1) * scale_log2)
            base = new_top
            p = tl.exp2(s * scale_log2 - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        top = new_top
        if DROPOUT:
            column_words = tl.load(column_words_ptr + keys, mask=inside, other=0)
            p = tl.where(kept(row_words[:, None], column_words[None, :], threshold), p, 0.0)
        v = load_tile(v_rows, inside, 0, MAIN, D, TAIL)
        p = p.to(v.dtype)
        acc = tl.dot(p, v, acc * shrink[:, None], input_precision=PRECISION)
        if REST > 0:
            v_rest = load_tile(v_rows, inside, MAIN, REST, D, TAIL)
            acc_rest = tl.dot(p, v_rest, acc_rest * shrink[:, None], input_precision=PRECISION)
    return acc, acc_rest, top, total


@triton.jit(do_not_specialize=COUNTS)
def prompt_attention_forward(
    q_ptr,  # (B, H, Nq, D)
    k_ptr,  # (B, H, N, D)
    v_ptr,  # (B, H, N, D)
    prompt_k_ptr,  # (1, B or T, H, P, D) or None
    prompt_v_ptr,  # (1, B or T, H, P, D) or None
    bias_ptr,  # (B, H, Nq, N), strides 0 where it is broadcast, or None
    row_words_ptr,  # (B, H, Nq) int32, contiguous, or None
    column_words_ptr,  # (N + P,) int32, contiguous, or None
    index_ptr,  # (B,) integers below T, or None
    out_ptr,  # (B, H, Nq, D)
    lse_ptr,  # (B, H, Nq) fp32, contiguous
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    prompt_k_b,
    prompt_k_h,
    prompt_k_n,
    prompt_v_b,
    prompt_v_h,
    prompt_v_n,
    bias_b,
    bias_h,
    bias_m,
    bias_n,
    out_b,
    out_h,
    out_n,
    H,
    Nq,
    N,
    P,
    scale_log2,
    keep_scale,
    threshold,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    PROMPTS: tl.constexpr,
    BANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    blocks = tl.cdiv(Nq, BLOCK_M)
    head = tl.program_id(0) // blocks
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    head = head.to(tl.int64)
    first_row = (tl.program_id(0) % blocks) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    queried = rows < Nq

    q_rows = q_ptr + b * q_b + h * q_h + rows.to(tl.int64) * q_n
    k_ptr += b * k_b + h * k_h
    v_ptr += b * v_b + h * v_h
    if PROMPTS:
        prompt_k_ptr += prompt_offset(b, h, index_ptr, prompt_k_b, prompt_k_h, BANK)
        prompt_v_ptr += prompt_offset(b, h, index_ptr, prompt_v_b, prompt_v_h, BANK)
    if BIAS > 0:
        bias_ptr += b * bias_b + h * bias_h
    row_words = rows
    if DROPOUT:
        row_words = tl.load(row_words_ptr + head * Nq + rows, mask=queried, other=0)

    q = load_tile(q_rows, queried, 0, MAIN, D, True)
    acc = tl.zeros([BLOCK_M, MAIN], tl.float32)
    # Placeholders that no code is made for where there is no rest.
    q_rest = q
    acc_rest = acc
    if REST > 0:
        q_rest = load_tile(q_rows, queried, MAIN, REST, D, True)
        acc_rest = tl.zeros([BLOCK_M, REST], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    whole = N // BLOCK_N * BLOCK_N
    # Keys before this one are seen by every query of the block, those from `stop` on by none.
    common = whole
    stop = whole
    if CAUSAL:
        common = tl.minimum(first_row // BLOCK_N * BLOCK_N, whole)
        stop = tl.minimum(tl.cdiv(first_row + BLOCK_M, BLOCK_N) * BLOCK_N, whole)
    acc, acc_rest, top, total = _attend(
        acc, acc_rest, top, total, q, q_rest, k_ptr, v_ptr, prompt_k_ptr, prompt_v_ptr, bias_ptr, row_words,
        column_words_ptr, k_n, v_n, prompt_k_n, prompt_v_n, bias_m, bias_n, rows, 0, common, Nq, N, scale_log2,
        threshold, D, MAIN, REST, BLOCK_N, BIAS, False, DROPOUT, False, PROMPTS, PRECISION,
    )  # fmt: skip
    if CAUSAL:
        acc, acc_rest, top, total = _attend(
            acc, acc_rest, top, total, q, q_rest, k_ptr, v_ptr, prompt_k_ptr, prompt_v_ptr, bias_ptr, row_words,
            column_words_ptr, k_n, v_n, prompt_k_n, prompt_v_n, bias_m, bias_n, rows, common, stop, Nq, N, scale_log2,
            threshold, D, MAIN, REST, BLOCK_N, BIAS, True, DROPOUT, False, PROMPTS, PRECISION,
        )  # fmt: skip
    end = N + P
    if CAUSAL and not PROMPTS:
        end = tl.minimum(end, first_row + BLOCK_M)
    acc, acc_rest, top, total = _attend(
        acc, acc_rest, top, total, q, q_rest, k_ptr, v_ptr, prompt_k_ptr, prompt_v_ptr, bias_ptr, row_words,
        column_words_ptr, k_n, v_n, prompt_k_n, prompt_v_n, bias_m, bias_n, rows, whole, end, Nq, N, scale_log2,
        threshold, D, MAIN, REST, BLOCK_T, BIAS, CAUSAL, DROPOUT, True, PROMPTS, PRECISION,
    )  # fmt: skip

    # A row without any key has the total 0: its output is 0 and its lse -inf.
    inverse = keep_scale / tl.where(total == 0.0, 1.0, total)
    out_rows = out_ptr + b * out_b + h * out_h + rows.to(tl.int64) * out_n
    store_tile(out_rows, queried, acc * inverse[:, None], 0, MAIN, D)
    if REST > 0:
        store_tile(out_rows, queried, acc_rest * inverse[:, None], MAIN, REST, D)
    tl.store(lse_ptr + head * Nq + rows, (top + tl.log2(total)) * LN2, mask=queried)
