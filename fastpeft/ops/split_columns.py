"""Cutting a product's output into parts whose gradients need not be put together again.

The gradients of queries, keys and values are written side by side by whoever computes them in one go. They then lie in
memory as the gradient of the whole output does, and joining them is free.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def split_columns(y: Tensor, splits: Sequence[int]) -> list[Tensor]:
    """`y.split(splits, dim=-1)`, whose backward pass copies only gradients that lie apart.

    Args:
        y: (..., sum of splits), contiguous.
        splits: widths of the parts.
    """
    if len(splits) == 1:
        return [y]
    if torch.compiler.is_compiling():
        return list(y.split(list(splits), dim=-1))
    return list(_Split.apply(y, tuple(splits)))


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, splits: tuple[int, ...]):
        ctx.set_materialize_grads(False)
        ctx.splits, ctx.shape = splits, y.shape
        return y.split(splits, dim=-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *parts: Tensor | None):
        whole = _beside(parts, ctx.shape)
        if whole is None:
            like = next(part for part in parts if part is not None)
            parts = [
                like.new_zeros(*ctx.shape[:-1], width) if part is None else part
                for part, width in zip(parts, ctx.splits, strict=True)
            ]
            whole = torch.cat(parts, dim=-1)
        return whole, None


def _beside(parts: Sequence[Tensor | None], shape: torch.Size) -> Tensor | None:
    """The contiguous tensor of this shape that the parts are the columns of, or None."""
    if any(part is None for part in parts):
        return None
    strides = torch.empty(shape, device="meta").stride()
    column = parts[0].storage_offset()
    memory = parts[0].untyped_storage().data_ptr()
    for part in parts:
        if part.untyped_storage().data_ptr() != memory or part.stride() != strides or part.storage_offset() != column:
            return None
        column += part.shape[-1]
    return parts[0].as_strided(shape, strides)
