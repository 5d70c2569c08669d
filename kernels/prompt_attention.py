"""Attention whose keys and values are tokens and prompts, forward and backward.

    out = softmax(scale * q [k; k_p]^T + bias) [v; v_p]

FlashAttention-2's order of work: scores never leave the chip, the log-sum-exp of every row is kept in fp32 and the
backward pass computes the probabilities again. Tokens and prompts are read where they lie, so nothing is concatenated,
and prompts that the batch shares are read, and their gradients summed over the batch, without being expanded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from fastpeft.kernels._launch import capability_of, launch, processors_of
from fastpeft.kernels._prompt_attention_backward import prompt_attention_delta, prompt_attention_query_gradient
from fastpeft.kernels._prompt_attention_backward_keys import (
    prompt_attention_prompt_gradients,
    prompt_attention_token_gradients,
)
from fastpeft.kernels._prompt_attention_choice import Blocks, candidates, choose, key, tail, widths
from fastpeft.kernels._prompt_attention_forward import prompt_attention_forward
from fastpeft.kernels._tune import rounded, tuned

_LOG2E = 1.4426950408889634
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_WIDEST = 128


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None = None,
    prompt_v: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float,
    dropout: float = 0.0,
    row_words: Tensor | None = None,
    column_words: Tensor | None = None,
    prompt_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over tokens and prompts.

    Args:
        q: (B, H, Nq, D), fp16, bf16 or fp32, any strides but the last, which is 1.
        k: (B, H, N, D), like q.
        v: like k.
        prompt_k: (H, p, D) shared by the batch, (B, H, p, D), or with prompt_index a bank (T, H, p, D), any strides;
            another dtype than q's is converted. p may be 0.
        prompt_v: like prompt_k.
        bias: broadcastable to (B, H, Nq, N), added to the tokens' scores, -inf for what must not be seen. Every query
            sees the prompts. A row that sees nothing gives 0.
        causal: query i sees tokens 0..i and every prompt.
        scale: of the scores, positive.
        dropout: probability on the attention weights, with both words.
        row_words: int32 (B, H, Nq), random words of the rows.
        column_words: int32 (N + p,), random words of the keys, tokens first. A weight is kept as in
            fastpeft/ops/dropout_mask.py.
        prompt_index: integers (B,), 0 <= task < T. Not checked: that would wait for the device.

    Returns:
        (B, H, Nq, D), a view of a contiguous (B, Nq, H, D), and its log-sum-exp (B, H, Nq) in fp32, natural, -inf for
        a row that sees nothing.

    Raises:
        ValueError: `reasons` names something.
    """
    values = _values(q, k, v, prompt_k, prompt_v, bias, causal, scale, dropout, row_words, column_words, prompt_index)
    batch, heads, rows, _ = q.shape
    out = _rows_before_heads(q)
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device)
    values |= {"out_ptr": out, "lse_ptr": lse} | _strides("out", out)

    def run(blocks: Blocks) -> tuple[Tensor, Tensor]:
        also = {"BLOCK_T": _key_tail(values, blocks)}
        _launch(prompt_attention_forward, triton.cdiv(rows, blocks.m) * batch * heads, values | also, blocks)
        return out, lse

    return _tuned(prompt_attention_forward, "forward", values, q, key(values, q), run)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None,
    prompt_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float,
    dropout: float = 0.0,
    row_words: Tensor | None = None,
    column_words: Tensor | None = None,
    prompt_index: Tensor | None = None,
    needs: tuple[bool, bool, bool, bool, bool] = (True, True, True, True, True),
    packed: Tensor | None = None,
    deterministic: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `forward`.

    Args:
        dout: (B, H, Nq, D), of q's dtype, any strides.
        q: as given to forward, and so are k, v, the prompts and everything from `bias` to `prompt_index`.
        k: see q.
        v: see q.
        prompt_k: see q.
        prompt_v: see q.
        out: what forward returned.
        lse: what forward returned.
        bias: see q.
        causal: see q.
        scale: see q.
        dropout: see q.
        row_words: see q.
        column_words: see q.
        prompt_index: see q.
        needs: which of dq, dk, dv, dprompt_k, dprompt_v are wanted. The others cost nothing.
        packed: (B, N, 3, H, D), contiguous, q's dtype, with Nq = N: dq, dk and dv are written into its slices and are
            views of it.
        deterministic: makes no difference. The result never depends on the order in which programs run: a sum over
            samples is one program's, or partial sums in fp32 that are added in a fixed order. That order is a matter of
            the blocks: the bits are the same in every run with the same file of measured choices (see `_tune.py`).

    Returns:
        dq, dk, dv, dprompt_k, dprompt_v in their inputs' shapes and dtypes, each a view of a contiguous tensor with
        rows before heads, as (B, n, H, D), or of `packed`. None for what is not wanted and for absent prompts.

    Raises:
        ValueError: `reasons` names something, or dout, out, lse or packed do not fit.
    """
    values = _values(q, k, v, prompt_k, prompt_v, bias, causal, scale, dropout, row_words, column_words, prompt_index)
    _check_backward(dout, q, k, out, lse, packed)
    needs_q, needs_k, needs_v = needs[:3]
    needs_pk, needs_pv = (need and prompt_k is not None for need in needs[3:])
    dout, out = _unit_stride(dout), _unit_stride(out)
    places = [None] * 3 if packed is None else [packed[:, :, i].transpose(1, 2) for i in range(3)]
    dq, dk, dv = (
        (_rows_before_heads(t) if place is None else place) if need else None
        for t, place, need in zip((q, k, v), places, (needs_q, needs_k, needs_v), strict=True)
    )
    delta = torch.empty_like(lse) if needs_k or needs_pk else None
    values |= {"dout_ptr": dout, "out_ptr": out, "lse_ptr": lse, "delta_ptr": delta, "STORE_DELTA": delta is not None}
    values |= {"dq_ptr": dq, "dk_ptr": dk, "dv_ptr": dv, "NEEDS_K": needs_k, "NEEDS_V": needs_v}
    for name, tensor in (("dout", dout), ("out", out), ("dq", dq), ("dk", dk), ("dv", dv)):
        values |= _strides(name, tensor)

    batch, heads, rows, width = q.shape

    def run_queries(blocks: Blocks) -> tuple[Tensor | None, ...]:
        also = {"BLOCK_T": _key_tail(values, blocks)}
        _launch(prompt_attention_query_gradient, triton.cdiv(rows, blocks.m) * batch * heads, values | also, blocks)
        return dq, delta

    def run_keys(blocks: Blocks) -> tuple[Tensor | None, ...]:
        also = {"BLOCK_T": tail(rows % blocks.m, blocks.m)}
        programs = triton.cdiv(k.shape[2], blocks.n) * batch * heads
        _launch(prompt_attention_token_gradients, programs, values | also, blocks)
        return dk, dv

    # First, since the others read the delta that it stores.
    if needs_q:
        kind = key(values, q, "STORE_DELTA")
        _tuned(prompt_attention_query_gradient, "queries", values, q, kind, run_queries)
    elif delta is not None:
        blocks = Blocks(32, 0, 4, 1)
        values["WIDTH"] = triton.next_power_of_2(width)
        _launch(prompt_attention_delta, triton.cdiv(rows, blocks.m) * batch * heads, values, blocks)
    if needs_k or needs_v:
        kind = key(values, q, "NEEDS_K", "NEEDS_V")
        _tuned(prompt_attention_token_gradients, "keys", values, q, kind, run_keys)
    return dq, dk, dv, *_prompt_gradients(values, q, prompt_k, prompt_v, needs_pk, needs_pv)


def _prompt_gradients(
    values: dict[str, Any], q: Tensor, prompt_k: Tensor | None, prompt_v: Tensor | None, needs_k: bool, needs_v: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the prompts, after the kernels that `values` has served so far."""
    if not (needs_k or needs_v):
        return None, None
    batch, heads, rows, width = q.shape
    length, groups = values["P"], values["G"]
    if length == 0:
        return torch.empty_like(prompt_k) if needs_k else None, torch.empty_like(prompt_v) if needs_v else None
    dtypes = [prompt.dtype for prompt, need in ((prompt_k, needs_k), (prompt_v, needs_v)) if need]

    def run(blocks: Blocks) -> Tensor:
        programs = triton.cdiv(length, blocks.n) * heads * groups
        # Pieces that can be given to different programs: samples of a bank, else blocks of queries.
        pieces = batch if values["BANK"] else triton.cdiv(rows * (batch if values["SHARED"] else 1), blocks.m)
        splits = max(1, min(pieces, triton.cdiv(2 * processors_of(q.device), programs)))
        dtype = dtypes[0] if splits == 1 and len(set(dtypes)) == 1 else torch.float32
        parts = torch.empty(len(dtypes), splits, groups, length, heads, width, dtype=dtype, device=q.device)
        also = {"NEEDS_K": needs_k, "NEEDS_V": needs_v, "splits": splits}
        also |= {"dk_ptr": parts[0] if needs_k else None, "dv_ptr": parts[-1] if needs_v else None}
        _launch(prompt_attention_prompt_gradients, programs * splits, values | also, blocks)
        return parts.sum(1) if splits > 1 else parts[:, 0]

    kind = key(values, q) | {"groups": rounded(groups), "needs_k": needs_k, "needs_v": needs_v}
    sums = _tuned(prompt_attention_prompt_gradients, "prompts", values, q, kind, run)
    if len(set(dtypes)) == 1:
        sums = sums.to(dtypes[0])
    sums = sums.transpose(-3, -2)
    return (
        sums[0].view_as(prompt_k).to(prompt_k.dtype) if needs_k else None,
        sums[-1].view_as(prompt_v).to(prompt_v.dtype) if needs_v else None,
    )


def reasons(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None = None,
    prompt_v: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float,
    dropout: float = 0.0,
    row_words: Tensor | None = None,
    column_words: Tensor | None = None,
    prompt_index: Tensor | None = None,
) -> list[str]:
    """Why `forward` and `backward` cannot run with these arguments, which are forward's; empty if they can."""
    found = []
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or (*q.shape[:2], q.shape[3]) != (*k.shape[:2], k.shape[3]):
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        return [f"q, k and v must be (B, H, Nq, D), (B, H, N, D) and (B, H, N, D), not {shapes}"]
    if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        found.append(f"q, k and v must have one dtype of fp16, bf16 and fp32, not {q.dtype}, {k.dtype} and {v.dtype}")
    if not 1 <= q.shape[3] <= _WIDEST:
        found.append(f"the head dimension must be from 1 to {_WIDEST}, not {q.shape[3]}")
    if any(t.stride(3) != 1 and t.shape[3] > 1 for t in (q, k, v)):
        found.append("the last stride of q, k and v must be 1")
    if not scale > 0.0:
        found.append(f"the scale must be positive, not {scale}")
    if q.dtype == torch.bfloat16 and capability_of(q.device) < 80:
        found.append("bf16 needs compute capability 8.0")
    found += _prompt_reasons(q, prompt_k, prompt_v, prompt_index)
    if bias is not None:
        found += _bias_reasons(q, k, bias)
    if not 0.0 <= dropout < 1.0:
        found.append(f"the dropout probability must be in [0, 1), not {dropout}")
    elif dropout > 0.0:
        length = 0 if prompt_k is None else prompt_k.shape[-2]
        for name, words, shape in (
            ("row_words", row_words, q.shape[:3]),
            ("column_words", column_words, (k.shape[2] + length,)),
        ):
            if words is None or words.dtype != torch.int32 or words.shape != shape:
                given = "None" if words is None else f"{words.dtype} {tuple(words.shape)}"
                found.append(f"dropout needs {name} of int32 {tuple(shape)}, not {given}")
    return found


def _prompt_reasons(q: Tensor, k: Tensor | None, v: Tensor | None, index: Tensor | None) -> list[str]:
    if k is None and v is None:
        return [] if index is None else ["prompt_index needs a bank of prompts"]
    if k is None or v is None:
        return ["prompt_k and prompt_v must be given together"]
    batch, heads, _, width = q.shape
    found = []
    if k.shape != v.shape or k.dim() not in (3, 4) or (k.shape[-3], k.shape[-1]) != (heads, width):
        found.append(f"prompts must be (H, p, D) or (.., H, p, D), not {tuple(k.shape)} and {tuple(v.shape)}")
    elif index is not None and (k.dim() != 4 or index.shape != (batch,)):
        found.append(
            f"prompt_index (B,) chooses from a bank (T, H, p, D), not {tuple(index.shape)} from {tuple(k.shape)}"
        )
    elif index is None and k.dim() == 4 and k.shape[0] != batch:
        found.append(f"prompts of {k.shape[0]} samples do not fit a batch of {batch}")
    if index is not None and index.dtype not in (torch.int32, torch.int64):
        found.append(f"prompt_index must be int32 or int64, not {index.dtype}")
    if not (k.is_floating_point() and v.is_floating_point()):
        found.append(f"prompts must be of a floating-point dtype, not {k.dtype} and {v.dtype}")
    return found


def _bias_reasons(q: Tensor, k: Tensor, bias: Tensor) -> list[str]:
    found = []
    if bias.dtype not in _DTYPES:
        found.append(f"the bias must be fp16, bf16 or fp32, not {bias.dtype}")
    if bias.requires_grad:
        found.append("there is no gradient for the bias")
    shape = (*q.shape[:3], k.shape[2])
    if bias.dim() > 4 or any(
        n not in (1, full) for n, full in zip(reversed(bias.shape), reversed(shape), strict=False)
    ):
        found.append(f"a bias of {tuple(bias.shape)} does not broadcast to {shape}")
    return found


def _values(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None,
    prompt_v: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    row_words: Tensor | None,
    column_words: Tensor | None,
    prompt_index: Tensor | None,
) -> dict[str, Any]:
    """Arguments of the kernels by name, as far as forward and backward share them.

    Raises:
        ValueError: `reasons` names something.
    """
    found = reasons(
        q, k, v, prompt_k, prompt_v, bias=bias, causal=causal, scale=scale, dropout=dropout, row_words=row_words,
        column_words=column_words, prompt_index=prompt_index,
    )  # fmt: skip
    if found:
        raise ValueError("prompt_attention: " + "; ".join(found))
    batch, heads, rows, width = q.shape
    tokens = k.shape[2]
    length = 0 if prompt_k is None else prompt_k.shape[-2]
    groups = 1 if length == 0 or prompt_k.dim() == 3 else prompt_k.shape[0]
    shared = length > 0 and prompt_k.dim() == 3
    if length == 0:
        prompt_k = prompt_v = prompt_index = None
    else:
        prompt_k, prompt_v = (_unit_stride(t.to(q.dtype)) for t in (prompt_k, prompt_v))
    kind = 0
    if bias is not None:
        bias = bias.expand(batch, heads, rows, tokens)
        kind = 2 if bias.stride(2) == 0 or rows == 1 else 1
    main, rest = widths(width)
    values = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "prompt_k_ptr": prompt_k, "prompt_v_ptr": prompt_v, "bias_ptr": bias,
        "row_words_ptr": row_words.contiguous() if dropout else None,
        "column_words_ptr": column_words.contiguous() if dropout else None,
        "index_ptr": None if prompt_index is None else prompt_index.contiguous(),
        "B": batch, "H": heads, "Nq": rows, "N": tokens, "P": length, "G": groups,
        "scale": float(scale), "scale_log2": scale * _LOG2E,
        "keep_scale": 1.0 / (1.0 - dropout), "threshold": round(dropout * (1 << 32)) - (1 << 31),
        "D": width, "MAIN": main, "REST": rest, "BIAS": kind, "CAUSAL": bool(causal), "DROPOUT": dropout > 0.0,
        "PROMPTS": length > 0, "SHARED": shared, "BANK": prompt_index is not None,
        "PRECISION": "tf32" if q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee",
    }  # fmt: skip
    for name, tensor in (("q", q), ("k", k), ("v", v), ("prompt_k", prompt_k), ("prompt_v", prompt_v)):
        values |= _strides(name, tensor)
    if shared:
        values["prompt_k_b"] = values["prompt_v_b"] = 0
    values |= dict(zip(("bias_b", "bias_h", "bias_m", "bias_n"), bias.stride() if kind else (0,) * 4, strict=True))
    return values


def _key_tail(values: dict[str, Any], blocks: Blocks) -> int:
    """Block size for the tokens that are no whole block together with the prompts."""
    return tail(values["N"] % blocks.n + values["P"], blocks.n)


def _strides(name: str, tensor: Tensor | None) -> dict[str, int]:
    """Strides of the batch, the heads and the rows; 0 for what is absent."""
    strides = (0, 0, 0) if tensor is None else tensor.stride()[-4:-1]
    if len(strides) == 2:
        strides = (0, *strides)
    return {f"{name}_b": strides[0], f"{name}_h": strides[1], f"{name}_n": strides[2]}


def _unit_stride(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it where its last stride is not 1, as in the gradient of a sum."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _rows_before_heads(like: Tensor) -> Tensor:
    """Empty (B, H, n, D) whose memory is (B, n, H, D), so that merging the heads is a view."""
    batch, heads, rows, width = like.shape
    return torch.empty(batch, rows, heads, width, dtype=like.dtype, device=like.device).transpose(1, 2)


def _check_backward(dout: Tensor, q: Tensor, k: Tensor, out: Tensor, lse: Tensor, packed: Tensor | None) -> None:
    for name, tensor in (("dout", dout), ("out", out)):
        if tensor.shape != q.shape or tensor.dtype != q.dtype:
            raise ValueError(
                f"prompt_attention: {name} must be {q.dtype} {tuple(q.shape)}, not {tensor.dtype} {tuple(tensor.shape)}"
            )
    if lse.shape != q.shape[:3] or lse.dtype != torch.float32 or not lse.is_contiguous():
        raise ValueError(
            f"prompt_attention: lse must be contiguous float32 {tuple(q.shape[:3])}, not {lse.dtype} {tuple(lse.shape)}"
        )
    if packed is None:
        return
    batch, heads, rows, width = q.shape
    if k.shape[2] != rows or packed.shape != (batch, rows, 3, heads, width):
        raise ValueError(
            f"prompt_attention: packed must be (B, N, 3, H, D) for queries {tuple(q.shape)} and {k.shape[2]} keys, "
            f"not {tuple(packed.shape)}"
        )
    if packed.dtype != q.dtype or not packed.is_contiguous():
        raise ValueError(f"prompt_attention: packed must be contiguous and {q.dtype}, not {packed.dtype}")


def _tuned(
    kernel: Any, name: str, values: dict[str, Any], q: Tensor, kind: dict[str, object], run: Callable[[Blocks], Any]
) -> Any:
    """Run with the blocks for these arguments."""
    others = functools.partial(candidates, name, values, q)
    return tuned(kernel, q.device, kind, choose(name, values, q), others, run)


def _launch(kernel: Any, programs: int, values: dict[str, Any], blocks: Blocks) -> None:
    """Launch with the arguments that the kernel has a name for."""
    values = values | {"BLOCK_M": blocks.m, "BLOCK_N": blocks.n}
    launch(kernel, (programs,), {name: values[name] for name in kernel.arg_names}, blocks.warps, blocks.stages)
