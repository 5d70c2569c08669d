"""Launches of prompt_attention in training steps: all gradients unless a label says otherwise."""

from __future__ import annotations

import contextlib
import functools

import torch

from fastpeft.kernels import prompt_attention

_BF16 = torch.bfloat16


def _case(
    heads: int,
    width: int,
    tokens: int,
    length: int,
    rows: int | None = None,
    kind: str = "shared",
    dtype: torch.dtype = _BF16,
    bias: tuple[int, ...] | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    needs: tuple[bool, ...] = (True,) * 5,
    batch: int = 64,
    tf32: bool = False,
) -> None:
    """`kind`: prompts shared by the batch, of each sample, or from a bank of ten tasks; none where `length` is 0."""
    empty = functools.partial(torch.empty, device="meta")
    q, k, v = empty(batch, tokens, 3, heads, width, dtype=dtype).permute(2, 0, 3, 1, 4)
    packed = empty(batch, tokens, 3, heads, width, dtype=dtype) if rows is None and all(needs[:3]) else None
    if rows is not None:
        q = empty(batch, rows, heads, width, dtype=dtype).transpose(1, 2)
    prompts = (None, None)
    options = {"scale": width**-0.5, "causal": causal, "dropout": dropout}
    if length:
        group = {"shared": (), "per_sample": (batch,), "bank": (10,)}[kind]
        both = empty(*group, length, 2, heads, width, dtype=dtype)
        prompts = tuple(t.transpose(-3, -2) for t in both.unbind(-3))
        options["prompt_index"] = empty(batch, dtype=torch.int64) if kind == "bank" else None
    if bias is not None:
        options["bias"] = empty(bias, dtype=dtype)
    if dropout:
        options["row_words"] = empty(batch, heads, q.shape[2], dtype=torch.int32)
        options["column_words"] = empty(tokens + length, dtype=torch.int32)
    with _tf32() if tf32 else contextlib.nullcontext():
        out, lse = prompt_attention.forward(q, k, v, *prompts, **options)
        prompt_attention.backward(out, q, k, v, *prompts, out, lse, **options, needs=needs, packed=packed)


@contextlib.contextmanager
def _tf32():
    """fp32 products as on the matrix units; without this they are exact and use none."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


_PROMPTS_ONLY = (False, False, False, True, True)

CASES = {
    "ViT-B/16, 50 prompts": functools.partial(_case, 12, 64, 197, 50),
    "ViT-B/16, 10 prompts, prompts' gradients alone": functools.partial(_case, 12, 64, 197, 10, needs=_PROMPTS_ONLY),
    "ViT-L/16, 1 prompt of each sample": functools.partial(_case, 16, 64, 197, 1, kind="per_sample"),
    "ViT-L/16, class token, 200 prompts": functools.partial(_case, 16, 64, 197, 200, rows=1),
    "ViT-H/14, 50 prompts": functools.partial(_case, 16, 80, 257, 50),
    "ViT-H/14, bank of 16 prompts, dropout": functools.partial(_case, 16, 80, 257, 16, kind="bank", dropout=0.1),
    "heads of 128, causal, bias": functools.partial(_case, 8, 128, 577, 17, causal=True, bias=(64, 8, 577, 577)),
    "heads of 40, no prompts": functools.partial(_case, 8, 40, 577, 0),
    "ViT-B/16, 50 prompts, fp16": functools.partial(_case, 12, 64, 197, 50, dtype=torch.float16),
    "ViT-B/16, 50 prompts, fp32": functools.partial(_case, 12, 64, 197, 50, dtype=torch.float32),
    "ViT-B/16, 50 prompts, tf32": functools.partial(_case, 12, 64, 197, 50, dtype=torch.float32, tf32=True),
}

# Whose candidates are compiled: one case for each way in which they are chosen.
CANDIDATES = (
    "ViT-B/16, 50 prompts",
    "ViT-H/14, 50 prompts",
    "heads of 128, causal, bias",
    "ViT-H/14, bank of 16 prompts, dropout",
)
