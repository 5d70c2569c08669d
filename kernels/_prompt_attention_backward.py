"""Backward kernels of prompt_attention that own queries: dq and delta. Those that own keys are in their own file.

With P_ij = exp(s_ij - lse_i) and the dropout mask M computed again, and delta_i = sum_d dout_id out_id:

    dv_j = sum_i P_ij M_ij dout_i,   dS_ij = P_ij (M_ij dout_i v_j - delta_i),
    dq_i = scale sum_j dS_ij k_j,    dk_j = scale sum_i dS_ij q_i

No two programs add to the same number, so that the result does not depend on the order in which they run: queries own
dq, keys own dk and dv, and where samples share a prompt, a program adds up its part of them and writes that sum apart.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastpeft.kernels._prompt_attention_forward import (
    COUNTS,
    LOG2E,
    kept,
    key_rows,
    load_bias,
    load_tile,
    prompt_offset,
    store_tile,
)


@triton.jit(do_not_specialize=COUNTS)
def prompt_attention_delta(
    dout_ptr,  # (B, H, Nq, D)
    out_ptr,  # (B, H, Nq, D)
    delta_ptr,  # (B, H, Nq) fp32, contiguous
    dout_b,
    dout_h,
    dout_n,
    out_b,
    out_h,
    out_n,
    H,
    Nq,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta = rowsum(dout * out), where the kernel of dq does not run and so cannot give it."""
    blocks = tl.cdiv(Nq, BLOCK_M)
    head = tl.program_id(0) // blocks
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    head = head.to(tl.int64)
    rows = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    queried = rows < Nq
    dout_rows = dout_ptr + b * dout_b + h * dout_h + rows.to(tl.int64) * dout_n
    out_rows = out_ptr + b * out_b + h * out_h + rows.to(tl.int64) * out_n
    dout = load_tile(dout_rows, queried, 0, WIDTH, D, True)
    out = load_tile(out_rows, queried, 0, WIDTH, D, True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + head * Nq + rows, delta, mask=queried)


@triton.jit
def load_lse(lse_ptr, lines, queried):
    """Log-sum-exp in units of log2; +inf, so that every probability is 0, where there is no row or it saw no key."""
    lse = tl.load(lse_ptr + lines, mask=queried, other=float("inf")) * LOG2E
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def _query_gradient(
    dq,
    dq_rest,
    q,
    q_rest,
    dout,
    dout_rest,
    lse,
    delta,
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
    keep_scale,
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
    """Add dS k of keys start to stop to dq; blocks as in the forward kernel."""
    for first in range(start, stop, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        inside = keys < stop
        k_rows = key_rows(k_ptr, k_n, prompt_k_ptr, prompt_k_n, keys, N, TAIL and PROMPTS)
        v_rows = key_rows(v_ptr, v_n, prompt_v_ptr, prompt_v_n, keys, N, TAIL and PROMPTS)
        k = load_tile(k_rows, inside, 0, MAIN, D, TAIL)
        v = load_tile(v_rows, inside, 0, MAIN, D, TAIL)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        if REST > 0:
            k_rest = load_tile(k_rows, inside, MAIN, REST, D, TAIL)
            v_rest = load_tile(v_rows, inside, MAIN, REST, D, TAIL)
            s = tl.dot(q_rest, tl.trans(k_rest), s, input_precision=PRECISION)
            dp = tl.dot(dout_rest, tl.trans(v_rest), dp, input_precision=PRECISION)
        s = s * scale_log2
        if BIAS > 0:
            s += load_bias(bias_ptr, bias_m, bias_n, rows[:, None], keys[None, :], Nq, N, BIAS)
        p = tl.exp2(s - lse[:, None])
        if CAUSAL:
            seen = keys[None, :] <= rows[:, None]
            if TAIL:
                if PROMPTS:
                    seen = seen | (keys >= N)[None, :]
                seen = seen & inside[None, :]
            p = tl.where(seen, p, 0.0)
        elif TAIL:
            p = tl.where(inside[None, :], p, 0.0)
        if DROPOUT:
            column_words = tl.load(column_words_ptr + keys, mask=inside, other=0)
            dp = tl.where(kept(row_words[:, None], column_words[None, :], threshold), dp * keep_scale, 0.0)
        ds = (p * (dp - delta[:, None])).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        if REST > 0:
            dq_rest = tl.dot(ds, k_rest, dq_rest, input_precision=PRECISION)
    return dq, dq_rest


@triton.jit(do_not_specialize=COUNTS)
def prompt_attention_query_gradient(
    dout_ptr,  # (B, H, Nq, D)
    out_ptr,  # (B, H, Nq, D)
    lse_ptr,  # (B, H, Nq) fp32, contiguous
    delta_ptr,  # (B, H, Nq) fp32, contiguous, written for the keys' kernels, or None
    q_ptr,  # (B, H, Nq, D)
    k_ptr,  # (B, H, N, D)
    v_ptr,  # (B, H, N, D)
    prompt_k_ptr,  # (1, B or T, H, P, D) or None
    prompt_v_ptr,  # (1, B or T, H, P, D) or None
    bias_ptr,  # (B, H, Nq, N), strides 0 where it is broadcast, or None
    row_words_ptr,  # (B, H, Nq) int32, contiguous, or None
    column_words_ptr,  # (N + P,) int32, contiguous, or None
    index_ptr,  # (B,) integers below T, or None
    dq_ptr,  # (B, H, Nq, D)
    dout_b,
    dout_h,
    dout_n,
    out_b,
    out_h,
    out_n,
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
    dq_b,
    dq_h,
    dq_n,
    H,
    Nq,
    N,
    P,
    scale,
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
    STORE_DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of a block of queries, and its delta, whose inputs are at hand."""
    blocks = tl.cdiv(Nq, BLOCK_M)
    head = tl.program_id(0) // blocks
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    head = head.to(tl.int64)
    first_row = (tl.program_id(0) % blocks) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    queried = rows < Nq

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

    q_rows = q_ptr + b * q_b + h * q_h + rows.to(tl.int64) * q_n
    dout_rows = dout_ptr + b * dout_b + h * dout_h + rows.to(tl.int64) * dout_n
    out_rows = out_ptr + b * out_b + h * out_h + rows.to(tl.int64) * out_n
    dout = load_tile(dout_rows, queried, 0, MAIN, D, True)
    out = load_tile(out_rows, queried, 0, MAIN, D, True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    q = load_tile(q_rows, queried, 0, MAIN, D, True)
    dq = tl.zeros([BLOCK_M, MAIN], tl.float32)
    # Placeholders that no code is made for where there is no rest.
    q_rest = q
    dout_rest = dout
    dq_rest = dq
    if REST > 0:
        dout_rest = load_tile(dout_rows, queried, MAIN, REST, D, True)
        out_rest = load_tile(out_rows, queried, MAIN, REST, D, True)
        delta += tl.sum(dout_rest.to(tl.float32) * out_rest.to(tl.float32), 1)
        q_rest = load_tile(q_rows, queried, MAIN, REST, D, True)
        dq_rest = tl.zeros([BLOCK_M, REST], tl.float32)
    if STORE_DELTA:
        tl.store(delta_ptr + head * Nq + rows, delta, mask=queried)
    lse = load_lse(lse_ptr, head * Nq + rows, queried)

    whole = N // BLOCK_N * BLOCK_N
    # As in the forward kernel: keys that all queries of the block see, keys that some see, the rest and the prompts.
    common = whole
    stop = whole
    if CAUSAL:
        common = tl.minimum(first_row // BLOCK_N * BLOCK_N, whole)
        stop = tl.minimum(tl.cdiv(first_row + BLOCK_M, BLOCK_N) * BLOCK_N, whole)
    dq, dq_rest = _query_gradient(
        dq, dq_rest, q, q_rest, dout, dout_rest, lse, delta, k_ptr, v_ptr, prompt_k_ptr, prompt_v_ptr, bias_ptr,
        row_words, column_words_ptr, k_n, v_n, prompt_k_n, prompt_v_n, bias_m, bias_n, rows, 0, common, Nq, N,
        scale_log2, keep_scale, threshold, D, MAIN, REST, BLOCK_N, BIAS, False, DROPOUT, False, PROMPTS, PRECISION,
    )  # fmt: skip
    if CAUSAL:
        dq, dq_rest = _query_gradient(
            dq, dq_rest, q, q_rest, dout, dout_rest, lse, delta, k_ptr, v_ptr, prompt_k_ptr, prompt_v_ptr, bias_ptr,
            row_words, column_words_ptr, k_n, v_n, prompt_k_n, prompt_v_n, bias_m, bias_n, rows, common, stop, Nq, N,
            scale_log2, keep_scale, threshold, D, MAIN, REST, BLOCK_N, BIAS, True, DROPOUT, False, PROMPTS, PRECISION,
        )  # fmt: skip
    end = N + P
    if CAUSAL and not PROMPTS:
        end = tl.minimum(end, first_row + BLOCK_M)
    dq, dq_rest = _query_gradient(
        dq, dq_rest, q, q_rest, dout, dout_rest, lse, delta, k_ptr, v_ptr, prompt_k_ptr, prompt_v_ptr, bias_ptr,
        row_words, column_words_ptr, k_n, v_n, prompt_k_n, prompt_v_n, bias_m, bias_n, rows, whole, end, Nq, N,
        scale_log2, keep_scale, threshold, D, MAIN, REST, BLOCK_T, BIAS, CAUSAL, DROPOUT, True, PROMPTS, PRECISION,
    )  # fmt: skip

    dq_rows = dq_ptr + b * dq_b + h * dq_h + rows.to(tl.int64) * dq_n
    store_tile(dq_rows, queried, dq * scale, 0, MAIN, D)
    if REST > 0:
        store_tile(dq_rows, queried, dq_rest * scale, MAIN, REST, D)
