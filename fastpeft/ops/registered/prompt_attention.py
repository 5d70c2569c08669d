"""`fastpeft::prompt_attention` and its backward operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpeft.ops.dropout_mask import keep_by_words
from fastpeft.ops.registered.common import gathered, given, nothing


@torch.library.custom_op("fastpeft::prompt_attention", mutates_args=())
def prompt_attention(
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
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, Nq, D) and log-sum-exp (B, H, Nq) in fp32, which the reference leaves zero."""
    from fastpeft.ops import prompt_attention as operator

    options = operator.Options.of(bias, causal, scale, dropout, row_words, column_words, prompt_index)
    module = operator.chosen(backend, q, k, v, prompt_k, prompt_v, options)
    if module is not None:
        return module.forward(q, k, v, prompt_k, prompt_v, **options.keywords())
    out = operator.by_reference(q, k, v, prompt_k, prompt_v, options)
    return _attention_layout(out), q.new_zeros(q.shape[:3], dtype=torch.float32)


def _attention_layout(out: Tensor) -> Tensor:
    """A view of contiguous (B, N, H, D), as every implementation gives it."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


@prompt_attention.register_fake
def _(q, k, v, prompt_k, prompt_v, bias, causal, scale, dropout, row_words, column_words, prompt_index, backend):
    batch, heads, rows, dim = q.shape
    out = q.new_empty(batch, rows, heads, dim).transpose(1, 2)
    return out, q.new_empty((batch, heads, rows), dtype=torch.float32)


@torch.library.custom_op("fastpeft::prompt_attention_backward", mutates_args=())
def prompt_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None,
    prompt_v: Tensor | None,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    dropout: float,
    row_words: Tensor | None,
    column_words: Tensor | None,
    prompt_index: Tensor | None,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    """Gradients of q, k, v and the prompts; empty where not needed."""
    from fastpeft.ops import prompt_attention as operator

    options = operator.Options.of(bias, causal, scale, dropout, row_words, column_words, prompt_index)
    module = operator.chosen(backend, q, k, v, prompt_k, prompt_v, options)
    if module is not None:
        saved = (q, k, v, prompt_k, prompt_v, out, lse)
        found = module.backward(dout, *saved, **options.keywords(), needs=tuple(needs))
    else:
        found = _reference_gradients(dout, q, k, v, prompt_k, prompt_v, options)
    return [g.contiguous() for g in gathered(found, (q, k, v, prompt_k, prompt_v), needs, dout)]


def _reference_gradients(dout, q, k, v, prompt_k, prompt_v, options):
    """P = softmax(scale q K^T + mask),  dV = P^T dout,  dP = dout V^T,  dS = P (dP - sum(dP P)),
    dq = scale dS K,  dK = scale dS^T q.
    """
    tokens, index = k.shape[2], options.prompt_index
    keys, values = k, v
    if prompt_k is not None:
        own = (prompt_k, prompt_v) if index is None else (prompt_k[index], prompt_v[index])
        keys, values = (torch.cat((t, p.expand(len(t), -1, -1, -1)), dim=2) for t, p in zip((k, v), own, strict=True))
    scores = options.scale * q @ keys.transpose(-1, -2)
    if options.causal:
        seen = torch.ones(q.shape[2], tokens, dtype=torch.bool, device=q.device).tril()
        scores[..., :tokens].masked_fill_(~seen, float("-inf"))
    if options.bias is not None:
        scores[..., :tokens] += options.bias
    p = scores.softmax(-1)
    dp = dout @ values.transpose(-1, -2)
    dropped = p
    if options.dropout:
        keep = keep_by_words(options.words.rows[..., None], options.words.columns, options.dropout)
        keep = keep.to(p.dtype) / (1.0 - options.dropout)
        dropped, dp = p * keep, dp * keep
    ds = options.scale * p * (dp - (dp * p).sum(-1, keepdim=True))
    dkeys, dvalues = ds.transpose(-1, -2) @ q, dropped.transpose(-1, -2) @ dout
    found = [ds @ keys, dkeys[:, :, :tokens], dvalues[:, :, :tokens], None, None]
    if prompt_k is not None:
        found[3:] = (_of_prompt(g[:, :, tokens:], prompt_k, index) for g in (dkeys, dvalues))
    return found


def _of_prompt(gradient: Tensor, prompt: Tensor, index: Tensor | None) -> Tensor:
    """The gradient of prompts from that of each sample's copy."""
    if index is not None:
        return torch.zeros_like(prompt).index_add_(0, index, gradient)
    return gradient if prompt.dim() == 4 else gradient.sum(0)


@prompt_attention_backward.register_fake
def _(dout, q, k, v, prompt_k, prompt_v, out, lse, *rest):
    needs = rest[-2]
    inputs = (q, k, v, prompt_k, prompt_v)
    return [t.new_empty(t.shape) if need else nothing(dout) for t, need in zip(inputs, needs, strict=True)]


def _prompt_attention_setup(ctx, inputs, output):
    q, k, v, prompt_k, prompt_v, bias, causal, scale, dropout, row_words, column_words, prompt_index, backend = inputs
    ctx.save_for_backward(q, k, v, prompt_k, prompt_v, *output, bias, row_words, column_words, prompt_index)
    ctx.settings = causal, scale, dropout, backend


def _prompt_attention_derivative(ctx, dout, dlse):
    *saved, bias, row_words, column_words, prompt_index = ctx.saved_tensors
    causal, scale, dropout, backend = ctx.settings
    needs = list(ctx.needs_input_grad[:5])
    found = prompt_attention_backward(
        dout, *saved, bias, causal, scale, dropout, row_words, column_words, prompt_index, needs, backend
    )
    return (*given(found, needs), *[None] * 8)


prompt_attention.register_autograd(_prompt_attention_derivative, setup_context=_prompt_attention_setup)
