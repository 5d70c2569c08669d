"""What the registrations share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def nothing(like: Tensor) -> Tensor:
    """What stands in a list of tensors for None."""
    return like.new_empty(0)


def gathered(
    found: Sequence[Tensor | None], inputs: Sequence[Tensor | None], needs: Sequence[bool], like: Tensor
) -> list[Tensor]:
    """Gradients as an operator may return them: no None, no two that share memory, each of its input's dtype."""
    seen, out = set(), []
    for gradient, own, need in zip(found, inputs, needs, strict=True):
        if not need or gradient is None:
            out.append(nothing(like))
            continue
        gradient = gradient.to(own.dtype)
        out.append(gradient.clone() if gradient.untyped_storage().data_ptr() in seen else gradient)
        seen.add(gradient.untyped_storage().data_ptr())
    return out


def given(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """Gradients as autograd takes them: None where not needed."""
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]


def fake_gradients(inputs: Sequence[Tensor | None], needs: Sequence[bool], like: Tensor) -> list[Tensor]:
    """What a backward operator gives on fake tensors."""
    return [torch.empty_like(t) if need else nothing(like) for t, need in zip(inputs, needs, strict=True)]


def as_rows(t: Tensor | None) -> Tensor | None:
    """(..., d) as a matrix of rows."""
    return None if t is None else t.flatten(0, -2)
