"""The CUDA kernels of csrc/cuda in the place of prompt_attention.

out = softmax(scale * q [k; prompt_k]^T) [v; prompt_v]
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft import _cuda

HEAD_DIMS = (32, 64, 80, 96, 128)
# Rows are counted in 32 bits, with room for a tile behind the last.
_MOST_ROWS = 2**30


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
    """Why the kernels cannot serve these arguments, which are `forward`'s; empty if they can."""
    found = _cuda.device_reasons(q)
    others = [t for t in (k, v, prompt_k, prompt_v) if t is not None and t.device != q.device]
    if others:
        found.append(f"q is on {q.device}, and other tensors are on {', '.join(str(t.device) for t in others)}")
    if q.dim() != 4 or k.shape != v.shape or k.dim() != 4 or (*q.shape[:2], q.shape[3]) != (*k.shape[:2], k.shape[3]):
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        return [*found, f"q, k and v must be (B, H, Nq, D), (B, H, N, D) and (B, H, N, D), not {shapes}"]
    if q.dtype not in (torch.float16, torch.bfloat16) or k.dtype != q.dtype or v.dtype != q.dtype:
        found.append(f"q, k and v must be all fp16 or all bf16, not {q.dtype}, {k.dtype} and {v.dtype}")
    if q.shape[3] not in HEAD_DIMS:
        found.append(f"the head dimension must be one of {', '.join(map(str, HEAD_DIMS))}, not {q.shape[3]}")
    elif not all(map(_cuda.aligned, (q, k, v))):
        found.append(f"rows of q, k and v must be contiguous and start at multiples of {_cuda.ALIGNMENT} bytes")
    if not scale > 0.0:
        found.append(f"the scale must be positive, not {scale}")
    if bias is not None:
        found.append("a mask or bias is not supported")
    if dropout:
        found.append("dropout is not supported")
    if prompt_index is not None:
        found.append("prompts chosen from a bank are not supported")
    length = 0
    if prompt_k is not None or prompt_v is not None:
        if prompt_k is None or prompt_v is None:
            return [*found, "prompt_k and prompt_v must be given together"]
        length = prompt_k.shape[-2]
        batch, heads, _, width = q.shape
        own, shared = (batch, heads, length, width), (heads, length, width)
        if prompt_k.shape != prompt_v.shape or tuple(prompt_k.shape) not in (own, shared):
            shapes = f"{tuple(prompt_k.shape)} and {tuple(prompt_v.shape)}"
            found.append(f"prompts must be (H, p, D) or (B, H, p, D), not {shapes}")
        if not (prompt_k.is_floating_point() and prompt_v.is_floating_point()):
            found.append(f"prompts must be of a floating-point dtype, not {prompt_k.dtype} and {prompt_v.dtype}")
    if q.numel() == 0 or k.shape[2] + length == 0:
        found.append("there is no query or no key")
    if max(q.shape[2], k.shape[2] + length) > _MOST_ROWS:
        found.append(f"there are more than {_MOST_ROWS} rows")
    return found


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prompt_k: Tensor | None = None,
    prompt_v: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float,
    **unused,
) -> tuple[Tensor, Tensor]:
    """Attention over tokens and prompts.

    Args:
        q: (B, H, Nq, D), fp16 or bf16, rows contiguous and aligned to 16 bytes.
        k: (B, H, N, D), like q.
        v: like k.
        prompt_k: (H, p, D) shared by the batch, (B, H, p, D), or None. Another dtype than q's is converted.
        prompt_v: like prompt_k.
        causal: query i sees tokens 0..i and every prompt.
        scale: of the scores, positive.
        unused: what `reasons` refuses.

    Returns:
        (B, H, Nq, D), a view of a contiguous (B, Nq, H, D), and its log-sum-exp (B, H, Nq) in fp32, natural.

    Raises:
        RuntimeError: what `reasons` names.
    """
    prompts = _prompts(q, prompt_k, prompt_v)
    return _cuda.library().prompt_attention_forward(q, k, v, *prompts, scale, causal)


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
    causal: bool = False,
    scale: float,
    needs: tuple[bool, bool, bool, bool, bool] = (True, True, True, True, True),
    packed: Tensor | None = None,
    **unused,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `forward`, the same in every run.

    Args:
        dout: (B, H, Nq, D), of q's dtype, any strides.
        q: as given to `forward`, and so are k, v, the prompts, causal and scale.
        k: see q.
        v: see q.
        prompt_k: see q.
        prompt_v: see q.
        out: what `forward` returned.
        lse: what `forward` returned.
        causal: see q.
        scale: see q.
        needs: which of dq, dk, dv, dprompt_k, dprompt_v are wanted. The others cost nothing.
        packed: (B, N, 3, H, D), contiguous, of q's dtype, with Nq = N: dq, dk and dv are written into its slices and
            are views of it.
        unused: what `reasons` refuses.

    Returns:
        Gradients in their inputs' shapes and dtypes, each a view of a contiguous tensor with rows before heads, or of
        `packed`; None for what is not wanted and for absent prompts.

    Raises:
        RuntimeError: what `reasons` names, or packed does not fit.
    """
    wanted = (*needs[:3], *(need and prompt_k is not None for need in needs[3:]))
    bits = sum(1 << place for place, need in enumerate(wanted) if need)
    dout, out = _cuda.realigned(dout), _cuda.realigned(out)
    prompts = _prompts(q, prompt_k, prompt_v)
    found = _cuda.library().prompt_attention_backward(dout, q, k, v, *prompts, out, lse, scale, causal, bits, packed)
    if packed is not None:
        found = (*(packed[:, :, part].transpose(1, 2) for part in range(3)), *found[3:])
    inputs = (q, k, v, prompt_k, prompt_v)
    return tuple(
        gradient.to(t.dtype) if need else None for gradient, t, need in zip(found, inputs, wanted, strict=True)
    )


def _prompts(q: Tensor, *prompts: Tensor | None) -> list[Tensor | None]:
    return [None if prompt is None else _cuda.realigned(prompt.to(q.dtype)) for prompt in prompts]
