"""Launches of layer_norm: with the residual sum before it, and both forms of the backward pass."""

from __future__ import annotations

import functools

import torch

from fastpeft.kernels import layer_norm


def _case(
    batch: int,
    tokens: int,
    dim: int,
    dtype: torch.dtype,
    branch: bool,
    backward: bool,
    affine: bool = False,
    shift: bool = False,
) -> None:
    """`affine`: gradients of weight and bias; `shift`: of the bias alone."""
    x, dy = (torch.empty(batch, tokens, dim, dtype=dtype, device="meta") for _ in range(2))
    weight, bias, gamma = (torch.empty(dim, dtype=torch.float32 if shift else dtype, device="meta") for _ in range(3))
    scale = gamma if branch else None
    _, s, mean, rstd = layer_norm.forward(x, weight, bias, 1e-6, branch=dy if branch else None, gamma=scale)
    if backward:
        layer_norm.backward(
            dy,
            s,
            weight,
            mean,
            rstd,
            ds=dy,
            gamma=scale,
            needs_branch=branch,
            needs_bias=affine or shift,
            needs_weight=affine,
        )


_BF16 = torch.bfloat16

CASES = {
    "ViT-B/16 (64, 197, 768) bf16": functools.partial(_case, 64, 197, 768, _BF16, False, True),
    "ViT-B/16 (64, 197, 768) bf16, sum": functools.partial(_case, 64, 197, 768, _BF16, True, True),
    "ViT-B/16 (64, 197, 768) bf16, fp32 shift": functools.partial(_case, 64, 197, 768, _BF16, True, True, shift=True),
    "ViT-L/16 (64, 197, 1024) bf16, affine": functools.partial(_case, 64, 197, 1024, _BF16, True, True, affine=True),
    "ViT-H/14 (64, 257, 1280) bf16, affine": functools.partial(_case, 64, 257, 1280, _BF16, True, True, affine=True),
    "one image (1, 197, 768) bf16, sum": functools.partial(_case, 1, 197, 768, _BF16, True, False),
    "(8, 197, 4096) bf16, affine": functools.partial(_case, 8, 197, 4096, _BF16, True, True, affine=True),
    "Swin (64, 3136, 96) fp16, affine": functools.partial(_case, 64, 3136, 96, torch.float16, True, True, affine=True),
    "ViT-B/16 (64, 197, 768) fp32, affine": functools.partial(
        _case, 64, 197, 768, torch.float32, True, True, affine=True
    ),
}

# Whose candidates are compiled: one case for each way in which they are chosen.
CANDIDATES = (
    "ViT-B/16 (64, 197, 768) bf16, sum",
    "ViT-L/16 (64, 197, 1024) bf16, affine",
    "(8, 197, 4096) bf16, affine",
    "Swin (64, 3136, 96) fp16, affine",
)
