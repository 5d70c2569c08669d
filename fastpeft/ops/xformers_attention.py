"""`xformers.ops.memory_efficient_attention` in the place of prompt_attention: prompts are concatenated for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _beside(rows: Tensor, prompt: Tensor | None, prompt_index: Tensor | None) -> Tensor:
    """Keys or values of tokens and prompts, (B, N + p, H, D), as xformers lays them out."""
    if prompt is not None:
        if prompt_index is not None:
            prompt = prompt[prompt_index]
        # xformers takes one dtype, and masters would make fp32 of all.
        rows = torch.cat((rows, prompt.to(rows.dtype).expand(len(rows), -1, -1, -1)), dim=2)
    return rows.transpose(1, 2)


# Modules of xformers.ops.fmha, in the order in which xformers itself tries them.
_KERNELS = ("flash3", "flash", "cutlass")


def _kernel(direction: str, q: Tensor, keys: Tensor, values: Tensor, causal: bool, scale: float) -> tuple[Any, str]:
    """The first of xformers' kernels that serves these arguments, or None and each one's reasons.

    Args:
        direction: "FwOp" or "BwOp".
        q: (B, Nq, H, D), and so are keys and values.
        keys: see q.
        values: see q.
        causal: query i sees keys 0..i.
        scale: of the scores.
    """
    from xformers.ops import fmha

    inputs = fmha.Inputs(q, keys, values, attn_bias=_mask(causal), p=0.0, scale=scale)
    refusals = []
    for name in _KERNELS:
        operator = getattr(getattr(fmha, name, None), direction, None)
        if operator is None:
            continue
        why = operator.not_supported_reasons(inputs)
        if not why:
            return operator, ""
        refusals.append(f"{operator.NAME}: {', '.join(why)}")
    return None, "; ".join(refusals) or "it has none of those known here"


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
    if not q.dtype == k.dtype == v.dtype:
        found.append(f"q, k and v must have one dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    if found:
        return found
    tensors = [t.transpose(1, 2) for t in (q, k, v)]
    for direction, words in (("FwOp", "forward"), ("BwOp", "backward")):
        operator, why = _kernel(direction, *tensors, causal, scale)
        if operator is None:
            found.append(f"xformers has no {words} kernel for this ({why})")
    return found


def _mask(causal: bool):
    if not causal:
        return None
    from xformers.ops.fmha.attn_bias import LowerTriangularMask

    return LowerTriangularMask()


def forward(
    q, k, v, prompt_k=None, prompt_v=None, *, causal: bool = False, scale: float, prompt_index=None, **unused
) -> tuple[Tensor, Tensor]:
    """Output (B, H, Nq, D) and log-sum-exp (B, H, Nq)."""
    from xformers.ops import fmha

    tensors = (q.transpose(1, 2), _beside(k, prompt_k, prompt_index), _beside(v, prompt_v, prompt_index))
    operator, _ = _kernel("FwOp", *tensors, causal, scale)
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(
        *tensors, attn_bias=_mask(causal), scale=scale, op=operator
    )
    # One of its kernels pads the rows; any of its backward kernels takes them without.
    return out.transpose(1, 2), lse[:, :, : q.shape[2]]


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

    if not any(needs):
        return (None,) * 5
    tensors = (q.transpose(1, 2), _beside(k, prompt_k, prompt_index), _beside(v, prompt_v, prompt_index))
    operator, _ = _kernel("BwOp", *tensors, causal, scale)
    gradients = fmha.memory_efficient_attention_backward(
        dout.transpose(1, 2).contiguous(),
        out.transpose(1, 2),
        lse,
        *tensors,
        attn_bias=_mask(causal),
        scale=scale,
        op=operator,
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
    return (gradient if prompt.dim() == 4 else gradient.sum(0, dtype=torch.float32)).to(prompt.dtype)
