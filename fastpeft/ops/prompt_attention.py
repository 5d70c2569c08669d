"""Attention whose keys and values are tokens and prompts.

    out = softmax(scale * q [k; k_p]^T + mask) [v; v_p]

Prompts are keys and values only. Their queries would produce rows that nobody reads.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.ops import registered
from fastpeft.ops.autocast import suspended, without_autocast, working
from fastpeft.ops.choose import BackendError, choose, is_reference, transformed
from fastpeft.ops.dropout_mask import keep_by_words
from fastpeft.ops.recomputed_attention import Recomputed, recomputes


class Words(NamedTuple):
    """Random words of a dropout mask on attention probabilities; see `dropout_mask.attention_words`.

    Attributes:
        rows: int32 (B, H, Nq).
        columns: int32 (N + p,), the tokens' first.
    """

    rows: Tensor
    columns: Tensor


def prompt_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None = None,
    prompt_v: Tensor | None = None,
    attn_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    words: Words | None = None,
    prompt_index: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Scaled dot-product attention over tokens and prompts.

    Args:
        q: (B, H, Nq, D).
        k: (B, H, N, D), any strides.
        v: like k.
        prompt_k: (H, p, D) shared by the batch, (B, H, p, D), with `prompt_index` a bank (T, H, p, D), or None.
        prompt_v: like prompt_k.
        attn_mask: broadcastable to (B, H, Nq, N), boolean (True: may attend) or additive; every query sees the prompts.
        causal: token i sees tokens 0..i and every prompt; not together with attn_mask.
        scale: of the logits; D ** -0.5 if None.
        dropout: probability on the attention weights.
        words: where its mask comes from; torch's generator if None.
        prompt_index: (B,), which of the bank's prompts each sample sees.
        lengths: int32 or int64 (B,) on the CPU, how many of its tokens each sample sees, 1 to N; None for all. The same
            as a mask, for less; not together with one.
        backend: "auto" or one of `fastpeft.ops.choose.BACKENDS`.

    Returns:
        (B, H, Nq, D).

    Raises:
        BackendError: the backend asked for cannot run.
        ValueError: a mask together with `causal` or with `lengths`; lengths of another shape, dtype or range.
    """
    if causal and attn_mask is not None:
        raise ValueError("prompt_attention takes a mask or causal=True, not both")
    if lengths is not None:
        if attn_mask is not None or causal:
            raise ValueError("prompt_attention takes lengths, a mask or causal=True, not two of them")
        lengths = _checked(lengths, q.shape[0], k.shape[-2])
        attn_mask = _mask_of(lengths, k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if prompt_k is not None and prompt_k.shape[-2] == 0:
        prompt_k = prompt_v = prompt_index = None
    # torch's generator draws inside torch's own function only.
    if not is_reference("prompt_attention", backend, q.device) and (not dropout or words is not None):
        q, k, v, prompt_k, prompt_v, attn_mask = working(q, k, v, prompt_k, prompt_v, attn_mask)
        if lengths is not None and not torch.compiler.is_compiling():
            given = Options(None, causal, scale, dropout, words, prompt_index, lengths)
            module = _takes_lengths(backend, q, k, v, prompt_k, prompt_v, given)
            if module is not None:
                with suspended(q.device):
                    return _Attention.apply(q, k, v, prompt_k, prompt_v, given, module)
        options = Options(_additive(attn_mask, q.dtype), causal, scale, dropout, words, prompt_index)
        if torch.compiler.is_compiling():
            return registered.prompt_attention(q, k, v, prompt_k, prompt_v, **options.keywords(), backend=backend)[0]
        module = chosen(backend, q, k, v, prompt_k, prompt_v, options)
        if module is not None:
            with suspended(q.device):
                return _Attention.apply(q, k, v, prompt_k, prompt_v, options, module)
    return reference(q, k, v, prompt_k, prompt_v, attn_mask, causal, scale, dropout, words, prompt_index)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None,
    prompt_v: Tensor | None,
    attn_mask: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    words: Words | None,
    prompt_index: Tensor | None,
) -> Tensor:
    """The equation in plain PyTorch: keys and values concatenated. Arguments as of `prompt_attention`."""
    if prompt_k is not None:
        if prompt_index is not None:
            prompt_k, prompt_v = prompt_k[prompt_index], prompt_v[prompt_index]
        length = prompt_k.shape[-2]
        if causal:
            attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
            causal = False
        if attn_mask is not None:
            attn_mask = F.pad(attn_mask, (0, length), value=True if attn_mask.dtype == torch.bool else 0.0)
        k = torch.cat((k, prompt_k.expand(k.shape[0], -1, -1, -1)), dim=2)
        v = torch.cat((v, prompt_v.expand(v.shape[0], -1, -1, -1)), dim=2)
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            q = _alone(q)
    if dropout and words is not None:
        return _dropped(q, k, v, attn_mask, causal, scale, dropout, words)
    if attn_mask is None and not causal and not dropout and recomputes(q, k, v):
        return Recomputed.apply(q, k, v, scale)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, is_causal=causal, scale=scale, dropout_p=dropout
    )


def _alone(q: Tensor) -> Tensor:
    """Queries that do not hold the keys and values that they were computed with, once those are copied elsewhere."""
    # Kept for the backward pass, a part keeps the whole; the compiler sees to that itself.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return q
    return q.clone() if q.untyped_storage().nbytes() > q.nbytes else q


def by_reference(q, k, v, prompt_k, prompt_v, options: Options) -> Tensor:
    """The reference with an implementation's arguments."""
    return reference(
        q,
        k,
        v,
        prompt_k,
        prompt_v,
        options.bias,
        options.causal,
        options.scale,
        options.dropout,
        options.words,
        options.prompt_index,
    )


def _dropped(q, k, v, attn_mask, causal: bool, scale: float, dropout: float, words: Words) -> Tensor:
    """Attention whose probabilities meet a mask that is a function of counters."""
    scores = (q * scale) @ k.transpose(-1, -2)
    if causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        scores = scores + _additive(attn_mask, scores.dtype)
    keep = keep_by_words(words.rows[..., None], words.columns, dropout)
    return (scores.softmax(-1) * keep.to(scores.dtype) / (1.0 - dropout)) @ v


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as a bias on the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def _checked(lengths: Tensor, batch: int, tokens: int) -> Tensor:
    """The lengths as implementations read them, if they are lengths of these samples."""
    if lengths.dtype not in (torch.int32, torch.int64) or lengths.shape != (batch,):
        raise ValueError(
            f"lengths must be int32 or int64 of shape {(batch,)}, got {lengths.dtype} of shape {tuple(lengths.shape)}"
        )
    # Looking is free on the CPU alone, and not while a graph is made.
    if lengths.device.type == "cpu" and batch and not torch.compiler.is_compiling() and not transformed():
        least, most = (int(value) for value in torch.aminmax(lengths))
        if least < 1 or most > tokens:
            raise ValueError(f"lengths must be 1 to {tokens}, the number of tokens, got {least} to {most}")
    return lengths.to(torch.int32).contiguous()


def _mask_of(lengths: Tensor, k: Tensor) -> Tensor:
    """Bool (B, 1, 1, N)."""
    order = torch.arange(k.shape[-2], device=k.device)
    return order < lengths.to(k.device)[:, None, None, None]


def _takes_lengths(backend: str, q, k, v, prompt_k, prompt_v, options: Options) -> ModuleType | None:
    """The module that serves these arguments with lengths, if the chosen one knows them."""

    def reasons(module: ModuleType) -> list[str]:
        if not getattr(module, "LENGTHS", False):
            return ["takes a mask instead of lengths"]
        return module.reasons(q, k, v, prompt_k, prompt_v, **options.keywords())

    try:
        return choose("prompt_attention", backend, q.device, reasons)
    except BackendError:
        # What was asked for by name serves with a mask instead.
        return None


def chosen(backend: str, q, k, v, prompt_k, prompt_v, options: Options) -> ModuleType | None:
    """The module that serves these arguments, or None for the reference."""
    return choose(
        "prompt_attention",
        backend,
        q.device,
        lambda module: module.reasons(q, k, v, prompt_k, prompt_v, **options.keywords()),
    )


class Options(NamedTuple):
    """What an implementation is told beside q, k, v and prompts."""

    bias: Tensor | None
    causal: bool
    scale: float
    dropout: float
    words: Words | None
    prompt_index: Tensor | None
    lengths: Tensor | None = None

    def keywords(self) -> dict:
        """As the keyword arguments of an implementation."""
        rows, columns = (None, None) if self.words is None else self.words
        lengths = {} if self.lengths is None else {"lengths": self.lengths}
        return lengths | {
            "bias": self.bias,
            "causal": self.causal,
            "scale": self.scale,
            "dropout": self.dropout,
            "row_words": rows,
            "column_words": columns,
            "prompt_index": self.prompt_index,
        }

    @classmethod
    def of(cls, bias, causal, scale, dropout, row_words, column_words, prompt_index) -> Options:
        """From the arguments of the registered operator."""
        words = None if row_words is None else Words(row_words, column_words)
        return cls(bias, causal, scale, dropout, words, prompt_index)


class _Attention(torch.autograd.Function):
    """Keeps q, k, v, the prompts, the log-sum-exp of every row, and the output where the backward pass reads it."""

    @staticmethod
    def forward(ctx, q, k, v, prompt_k, prompt_v, options: Options, module: ModuleType):
        out, lse = module.forward(q, k, v, prompt_k, prompt_v, **options.keywords())
        reads = getattr(module, "reads_output", _always)(q, k, options.bias, options.causal, options.dropout)
        ctx.save_for_backward(q, k, v, prompt_k, prompt_v, out if reads else None, lse)
        ctx.options, ctx.module = options, module
        ctx.one_memory = k is v and prompt_k is None and getattr(module, "ONE_MEMORY", False)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx, dout: Tensor):
        q, k, v, *rest = ctx.saved_tensors
        packed = _packed_like(q, k, v) if all(ctx.needs_input_grad[:3]) else None
        together = {"one_memory": True} if ctx.one_memory else {}
        gradients = ctx.module.backward(
            dout, q, k, v, *rest, **ctx.options.keywords(), needs=ctx.needs_input_grad[:5], packed=packed, **together
        )
        return (*gradients, None, None)


def _always(*_) -> bool:
    return True


def _packed_like(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """Memory (B, N, 3, H, D) for three gradients side by side, if q, k and v lie like that themselves."""
    batch, heads, rows, dim = q.shape
    width = heads * dim
    strides = (rows * 3 * width, dim, 3 * width, 1)
    if not (q.shape == k.shape and q.stride() == k.stride() == v.stride() == strides):
        return None
    start = q.storage_offset()
    if (k.storage_offset() - start, v.storage_offset() - start) != (width, 2 * width):
        return None
    return q.new_empty(batch, rows, 3, heads, dim)
