"""`xformers.ops.memory_efficient_attention` in the place of prompt_attention: prompts are concatenated for it."""

from __future__ import annotations

import torch
from torch import Tensor


def _beside(rows: Tensor, prompt: Tensor | None, prompt_index: Tensor | None) -> Tensor:
    """Keys or values of tokens and prompts, (B, N + p, H, D), as xformers lays them out."""
    if prompt is not None:
        if prompt_index is not None:
            prompt = prompt[prompt_index]
        rows = torch.cat((rows, prompt.expand(len(rows), -1, -1, -1)), dim=2)
    return rows.transpose(1, 2)


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
    """Why xformers cannot serve; its own reasons too."""
    found = []
    if bias is not None:
        found.append("a mask or bias is not handed to xformers, whose layout of it depends on the kernel")
    if causal and (prompt_k is not None or q.shape[-2] != k.shape[-2]):
        found.append("a causal mask does not go with prompts")
    if dropout:
        found.append("dropout would be drawn from xformers' own generator")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        found.append(f"xformers has no kernel for {q.dtype}")
    if found:
        return found
    from xformers.ops import fmha

    shapes = (t.transpose(1, 2) for t in (q, k, v))
    inputs = fmha.Inputs(*shapes, attn_bias=_mask(causal), p=0.0, scale=scale)
    refusals = [(operator.NAME, operator.not_supported_reasons(inputs)) for operator in fmha.ALL_FW_OPS]
    if any(not why for _, why in refusals):
        return []
    return [f"xformers {name}: {', '.join(why)}" for name, why in refusals]


def _mask(causal: bool):
    if not causal:
        return None
    from xformers.ops.fmha.attn_bias import LowerTriangularMask

    return LowerTriangularMask()


def forward(
    q, k, v, prompt_k=None, prompt_v=None, *, causal: bool = False, scale: float, prompt_index=None, **unused
) -> tuple[Tensor, Tensor]:
    """Output (B, H, Nq, D) and log-sum-exp, laid out as xformers' backward pass wants it."""
    from xformers.ops import fmha

    keys, values = _beside(k, prompt_k, prompt_index), _beside(v, prompt_v, prompt_index)
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(
        q.transpose(1, 2), keys, values, attn_bias=_mask(causal), scale=scale
    )
    return out.transpose(1, 2), lse


def backward(
    dout,
    q,
    k,
    v,
    prompt_k,
    prompt_v,
    out,
    lse,
    *,
    causal: bool = False,
    scale: float,
    prompt_index=None,
    needs=(True,) * 5,
    **unused,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v and the prompts; None where not needed."""
    from xformers.ops import fmha

    keys, values = _beside(k, prompt_k, prompt_index), _beside(v, prompt_v, prompt_index)
    gradients = fmha.memory_efficient_attention_backward(
        dout.transpose(1, 2),
        out.transpose(1, 2),
        lse,
        q.transpose(1, 2),
        keys,
        values,
        attn_bias=_mask(causal),
        scale=scale,
    )
    dq, dk, dv = (gradient.transpose(1, 2) for gradient in gradients)
    tokens = k.shape[-2]
    found = [dq, dk[:, :, :tokens], dv[:, :, :tokens], None, None]
    if prompt_k is not None:
        for place, gradient, prompt in ((3, dk, prompt_k), (4, dv, prompt_v)):
            if needs[place]:
                found[place] = _of_prompt(gradient[:, :, tokens:], prompt, prompt_index)
    return tuple(gradient if need else None for gradient, need in zip(found, needs, strict=True))


def _of_prompt(gradient: Tensor, prompt: Tensor, prompt_index: Tensor | None) -> Tensor:
    """The gradient of prompts from that of their copies, (B, H, p, D)."""
    if prompt_index is not None:
        summed = torch.zeros(prompt.shape, dtype=torch.float32, device=prompt.device)
        return summed.index_add_(0, prompt_index, gradient.float()).to(prompt.dtype)
    return gradient if prompt.dim() == 4 else gradient.sum(0, dtype=torch.float32).to(prompt.dtype)
