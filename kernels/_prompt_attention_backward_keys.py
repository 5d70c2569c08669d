"""Backward kernels of prompt_attention that own keys: dk and dv of the tokens and of the prompts.

The equations are in _prompt_attention_backward.py. Prompts have their own kernel since samples may share them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastpeft.kernels._prompt_attention_backward import load_lse
from fastpeft.kernels._prompt_attention_forward import COUNTS, kept, load_bias, load_tile, store_tile


@triton.jit
def _key_gradients(
    dk,
    dk_rest,
    dv,
    dv_rest,
    k,
    k_rest,
    v,
    v_rest,
    q_rows,
    dout_rows,
    lse_ptr,
    delta_ptr,
    bias_ptr,
    row_words_ptr,
    column_words,
    bias_m,
    bias_n,
    lines,
    queried,
    rows,
    keys,
    Nq,
    N,
    scale_log2,
    keep_scale,
    threshold,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    NEEDS_K: tl.constexpr,
    NEEDS_V: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what a block of queries contributes to dk and dv of a block of keys; tiles are keys x queries.

    `lines` are the places of the queries in (B, H, Nq). If MASKED, some may not be `queried`: their probability is 0.
    What absent keys get is never stored.
    """
    q = load_tile(q_rows, queried, 0, MAIN, D, MASKED)
    dout = load_tile(dout_rows, queried, 0, MAIN, D, MASKED)
    lse = load_lse(lse_ptr, lines, queried)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    if REST > 0:
        q_rest = load_tile(q_rows, queried, MAIN, REST, D, MASKED)
        dout_rest = load_tile(dout_rows, queried, MAIN, REST, D, MASKED)
        s = tl.dot(k_rest, tl.trans(q_rest), s, input_precision=PRECISION)
    s = s * scale_log2
    if BIAS > 0:
        s += load_bias(bias_ptr, bias_m, bias_n, rows[None, :], keys[:, None], Nq, N, BIAS)
    p = tl.exp2(s - lse[None, :])
    if CAUSAL:
        p = tl.where(keys[:, None] <= rows[None, :], p, 0.0)
    if DROPOUT:
        row_words = tl.load(row_words_ptr + lines, mask=queried, other=0)
        keep = kept(row_words[None, :], column_words[:, None], threshold)
    if NEEDS_V:
        weights = p
        if DROPOUT:
            weights = tl.where(keep, p * keep_scale, 0.0)
        weights = weights.to(dout.dtype)
        dv = tl.dot(weights, dout, dv, input_precision=PRECISION)
        if REST > 0:
            dv_rest = tl.dot(weights, dout_rest, dv_rest, input_precision=PRECISION)
    if NEEDS_K:
        delta = tl.load(delta_ptr + lines, mask=queried, other=0.0)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        if REST > 0:
            dp = tl.dot(v_rest, tl.trans(dout_rest), dp, input_precision=PRECISION)
        if DROPOUT:
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = (p * (dp - delta[None, :])).to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
        if REST > 0:
            dk_rest = tl.dot(ds, q_rest, dk_rest, input_precision=PRECISION)
    return dk, dk_rest, dv, dv_rest


@triton.jit(do_not_specialize=COUNTS)
def prompt_attention_token_gradients(
    dout_ptr,  # (B, H, Nq, D)
    lse_ptr,  # (B, H, Nq) fp32, contiguous
    delta_ptr,  # (B, H, Nq) fp32, contiguous, or None
    q_ptr,  # (B, H, Nq, D)
    k_ptr,  # (B, H, N, D)
    v_ptr,  # (B, H, N, D)
    bias_ptr,  # (B, H, Nq, N), strides 0 where it is broadcast, or None
    row_words_ptr,  # (B, H, Nq) int32, contiguous, or None
    column_words_ptr,  # (N + P,) int32, contiguous, or None
    dk_ptr,  # (B, H, N, D) or None
    dv_ptr,  # (B, H, N, D) or None
    dout_b,
    dout_h,
    dout_n,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    bias_b,
    bias_h,
    bias_m,
    bias_n,
    dk_b,
    dk_h,
    dk_n,
    dv_b,
    dv_h,
    dv_n,
    H,
    Nq,
    N,
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
    NEEDS_K: tl.constexpr,
    NEEDS_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of a block of token keys, over all queries that see it."""
    blocks = tl.cdiv(N, BLOCK_N)
    head = tl.program_id(0) // blocks
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    head = head.to(tl.int64)
    first_key = (tl.program_id(0) % blocks) * BLOCK_N
    keys = first_key + tl.arange(0, BLOCK_N)
    inside = keys < N

    q_ptr += b * q_b + h * q_h
    dout_ptr += b * dout_b + h * dout_h
    k_rows = k_ptr + b * k_b + h * k_h + keys.to(tl.int64) * k_n
    v_rows = v_ptr + b * v_b + h * v_h + keys.to(tl.int64) * v_n
    if BIAS > 0:
        bias_ptr += b * bias_b + h * bias_h
    column_words = keys
    if DROPOUT:
        column_words = tl.load(column_words_ptr + keys, mask=inside, other=0)

    k = load_tile(k_rows, inside, 0, MAIN, D, True)
    dk = tl.zeros([BLOCK_N, MAIN], tl.float32)
    dv = tl.zeros([BLOCK_N, MAIN], tl.float32)
    # Placeholders that no code is made for where there is no rest or no need.
    v = k
    k_rest = k
    v_rest = k
    dk_rest = dk
    dv_rest = dv
    if NEEDS_K:
        v = load_tile(v_rows, inside, 0, MAIN, D, True)
    if REST > 0:
        k_rest = load_tile(k_rows, inside, MAIN, REST, D, True)
        dk_rest = tl.zeros([BLOCK_N, REST], tl.float32)
        dv_rest = tl.zeros([BLOCK_N, REST], tl.float32)
        if NEEDS_K:
            v_rest = load_tile(v_rows, inside, MAIN, REST, D, True)

    start = 0
    if CAUSAL:
        start = first_key // BLOCK_M * BLOCK_M
    whole = Nq // BLOCK_M * BLOCK_M
    for first_row in range(start, whole, BLOCK_M):
        rows = first_row + tl.arange(0, BLOCK_M)
        dk, dk_rest, dv, dv_rest = _key_gradients(
            dk, dk_rest, dv, dv_rest, k, k_rest, v, v_rest, q_ptr + rows.to(tl.int64) * q_n,
            dout_ptr + rows.to(tl.int64) * dout_n, lse_ptr, delta_ptr, bias_ptr, row_words_ptr, column_words, bias_m,
            bias_n, head * Nq + rows, rows < Nq, rows, keys, Nq, N, scale_log2, keep_scale, threshold,
            D, MAIN, REST, BIAS, CAUSAL, DROPOUT, NEEDS_K, NEEDS_V, False, PRECISION,
        )  # fmt: skip
    for first_row in range(tl.maximum(start, whole), Nq, BLOCK_T):
        rows = first_row + tl.arange(0, BLOCK_T)
        dk, dk_rest, dv, dv_rest = _key_gradients(
            dk, dk_rest, dv, dv_rest, k, k_rest, v, v_rest, q_ptr + rows.to(tl.int64) * q_n,
            dout_ptr + rows.to(tl.int64) * dout_n, lse_ptr, delta_ptr, bias_ptr, row_words_ptr, column_words, bias_m,
            bias_n, head * Nq + rows, rows < Nq, rows, keys, Nq, N, scale_log2, keep_scale, threshold,
            D, MAIN, REST, BIAS, CAUSAL, DROPOUT, NEEDS_K, NEEDS_V, True, PRECISION,
        )  # fmt: skip

    if NEEDS_K:
        dk_rows = dk_ptr + b * dk_b + h * dk_h + keys.to(tl.int64) * dk_n
        store_tile(dk_rows, inside, dk * scale, 0, MAIN, D)
        if REST > 0:
            store_tile(dk_rows, inside, dk_rest * scale, MAIN, REST, D)
    if NEEDS_V:
        dv_rows = dv_ptr + b * dv_b + h * dv_h + keys.to(tl.int64) * dv_n
        store_tile(dv_rows, inside, dv, 0, MAIN, D)
        if REST > 0:
            store_tile(dv_rows, inside, dv_rest, MAIN, REST, D)


@triton.jit(do_not_specialize=COUNTS)
def prompt_attention_prompt_gradients(
    dout_ptr,  # (B, H, Nq, D)
    lse_ptr,  # (B, H, Nq) fp32, contiguous
    delta_ptr,  # (B, H, Nq) fp32, contiguous, or None
    q_ptr,  # (B, H, Nq, D)
    prompt_k_ptr,  # (G, H, P, D), G: 1, B or T
    prompt_v_ptr,  # (G, H, P, D)
    row_words_ptr,  # (B, H, Nq) int32, contiguous, or None
    column_words_ptr,  # (N + P,) int32, contiguous, or None
    index_ptr,  # (B,) integers below T, or None
    dk_ptr,  # (splits, G, P, H, D), contiguous, or None
    dv_ptr,  # (splits, G, P, H, D), contiguous, or None
    dout_b,
    dout_h,
    dout_n,
    q_b,
    q_h,
    q_n,
    prompt_k_b,
    prompt_k_h,
    prompt_k_n,
    prompt_v_b,
    prompt_v_h,
    prompt_v_n,
    B,
    H,
    Nq,
    N,
    P,
    G,
    splits,
    scale,
    scale_log2,
    keep_scale,
    threshold,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DROPOUT: tl.constexpr,
    SHARED: tl.constexpr,
    BANK: tl.constexpr,
    NEEDS_K: tl.constexpr,
    NEEDS_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of a block of prompts of one head and group (of the batch, a sample or a task), a split of its queries.

    Every query sees every prompt, whatever the bias or causality says of the tokens.
    """
    blocks = tl.cdiv(P, BLOCK_N)
    pid = tl.program_id(0)
    first_prompt = (pid % blocks) * BLOCK_N
    pid = pid // blocks
    h = (pid % H).to(tl.int64)
    pid = pid // H
    g = (pid % G).to(tl.int64)
    split = pid // G

    prompts = first_prompt + tl.arange(0, BLOCK_N)
    inside = prompts < P
    k_rows = prompt_k_ptr + g * prompt_k_b + h * prompt_k_h + prompts.to(tl.int64) * prompt_k_n
    v_rows = prompt_v_ptr + g * prompt_v_b + h * prompt_v_h + prompts.to(tl.int64) * prompt_v_n
    keys = N + prompts
    column_words = keys
    if DROPOUT:
        column_words = tl.load(column_words_ptr + keys, mask=inside, other=0)

    k = load_tile(k_rows, inside, 0, MAIN, D, True)
    dk = tl.zeros([BLOCK_N, MAIN], tl.float32)
    dv = tl.zeros([BLOCK_N, MAIN], tl.float32)
    # Placeholders that no code is made for where there is no rest or no need.
    v = k
    k_rest = k
    v_rest = k
    dk_rest = dk
    dv_rest = dv
    if NEEDS_K:
        v = load_tile(v_rows, inside, 0, MAIN, D, True)
    if REST > 0:
        k_rest = load_tile(k_rows, inside, MAIN, REST, D, True)
        dk_rest = tl.zeros([BLOCK_N, REST], tl.float32)
        dv_rest = tl.zeros([BLOCK_N, REST], tl.float32)
        if NEEDS_K:
            v_rest = load_tile(v_rows, inside, MAIN, REST, D, True)

    if BANK:
        # Samples of other tasks are passed over.
        for sample in range(B * split // splits, B * (split + 1) // splits):
            mine = tl.load(index_ptr + sample).to(tl.int64) == g
            for first_row in range(0, tl.where(mine, Nq, 0), BLOCK_M):
                b = tl.cast(sample, tl.int64)
                rows = first_row + tl.arange(0, BLOCK_M)
                dk, dk_rest, dv, dv_rest = _key_gradients(
                    dk, dk_rest, dv, dv_rest, k, k_rest, v, v_rest,
                    q_ptr + b * q_b + h * q_h + rows.to(tl.int64) * q_n,
                    dout_ptr + b * dout_b + h * dout_h + rows.to(tl.int64) * dout_n, lse_ptr, delta_ptr, None,
                    row_words_ptr, column_words, 0, 0, (b * H + h) * Nq + rows, rows < Nq, rows, keys, Nq, N,
                    scale_log2, keep_scale, threshold, D, MAIN, REST, 0, False, DROPOUT, NEEDS_K, NEEDS_V, True,
                    PRECISION,
                )  # fmt: skip
    else:
        # Queries of all samples that share the prompts are one sequence: no block but the last is ragged.
        total = Nq
        if SHARED:
            total = B * Nq
        blocks = tl.cdiv(total, BLOCK_M)
        for block in range(blocks * split // splits, blocks * (split + 1) // splits):
            places = block * BLOCK_M + tl.arange(0, BLOCK_M)
            b = g
            rows = places
            if SHARED:
                b = (places // Nq).to(tl.int64)
                rows = places % Nq
            dk, dk_rest, dv, dv_rest = _key_gradients(
                dk, dk_rest, dv, dv_rest, k, k_rest, v, v_rest,
                q_ptr + h * q_h + b * q_b + rows.to(tl.int64) * q_n,
                dout_ptr + h * dout_h + b * dout_b + rows.to(tl.int64) * dout_n, lse_ptr, delta_ptr, None,
                row_words_ptr, column_words, 0, 0, (b * H + h) * Nq + rows, places < total, rows, keys, Nq, N,
                scale_log2, keep_scale, threshold, D, MAIN, REST, 0, False, DROPOUT, NEEDS_K, NEEDS_V, True,
                PRECISION,
            )  # fmt: skip

    group = split.to(tl.int64) * G + g
    offsets = ((group * P + prompts) * H + h) * D
    if NEEDS_K:
        store_tile(dk_ptr + offsets, inside, dk * scale, 0, MAIN, D)
        if REST > 0:
            store_tile(dk_ptr + offsets, inside, dk_rest * scale, MAIN, REST, D)
    if NEEDS_V:
        store_tile(dv_ptr + offsets, inside, dv, 0, MAIN, D)
        if REST > 0:
            store_tile(dv_ptr + offsets, inside, dv_rest, MAIN, REST, D)
