"""Launches of adapter, forward and backward, over the rows of a training step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastpeft.kernels import adapter


def _case(
    rows: int,
    dim: int,
    hidden: int,
    dtype: torch.dtype = torch.bfloat16,
    factors: torch.dtype = torch.float32,
    activation: str = "gelu",
    skip: bool = True,
    bias: bool = True,
    backward: bool = True,
    tf32: bool = False,
) -> Callable[[], None]:
    def case() -> None:
        x, other = (torch.empty(rows, dim, dtype=dtype, device="meta") for _ in range(2))
        down, up = (torch.empty(size, dtype=factors, device="meta") for size in ((hidden, dim), (dim, hidden)))
        down_bias, up_bias = (torch.empty(n, dtype=factors, device="meta") if bias else None for n in (hidden, dim))
        arguments = (x, down, down_bias, up, up_bias, activation, 1.0)
        before = torch.backends.cuda.matmul.allow_tf32
        # Without it products in fp32 are exact and use no matrix instructions.
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            adapter.forward(*arguments, residual=x if skip else other)
            if backward:
                adapter.backward(other, *arguments, skip=skip)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return case


_B, _H = 64 * 197, 64 * 257

CASES: dict[str, Callable[[], object]] = {
    "ViT-B/16 (64 x 197, 768) bf16, hidden 64": _case(
        _B, 768, 64, factors=torch.bfloat16, activation="relu", bias=False
    ),
    "ViT-B/16 (64 x 197, 768) bf16, hidden 96, masters": _case(_B, 768, 96),
    "ViT-B/16 (64 x 197, 768) bf16, hidden 12, masters": _case(_B, 768, 12),
    "ViT-L/16 (64 x 197, 1024) bf16, hidden 128, parallel": _case(_B, 1024, 128, skip=False),
    "ViT-H/14 (64 x 257, 1280) bf16, hidden 160, masters": _case(_H, 1280, 160),
    "one image (197, 768) bf16, hidden 64": _case(197, 768, 64, backward=False),
    "ViT-B/16 (64 x 197, 768) fp16, hidden 64": _case(_B, 768, 64, torch.float16),
    "ViT-B/16 (64 x 197, 768) tf32, hidden 64": _case(_B, 768, 64, torch.float32, tf32=True),
}

# Whose candidates are compiled: one case for each way in which they are chosen.
CANDIDATES = (
    "ViT-B/16 (64 x 197, 768) bf16, hidden 64",
    "ViT-L/16 (64 x 197, 1024) bf16, hidden 128, parallel",
    "ViT-H/14 (64 x 257, 1280) bf16, hidden 160, masters",
)
