"""A frozen linear layer with low-rank terms beside it.

    y = x W^T + b,    y[..., s:e] += scale * drop(x) A^T B^T    for every term

The product with W is never repeated and W is never changed; the terms add into its output, in its precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LowRankTerm(NamedTuple):
    """One pair of factors and the output columns it adds to.

    Attributes:
        a: (r, in).
        b: (stop - start, r).
        scale: factor of the product.
        start: first output column.
        stop: one behind the last.
        dropout: applied to x before A; None for none.
        bias: (stop - start,) added with the product and its scale, or None.
    """

    a: Tensor
    b: Tensor
    scale: float
    start: int
    stop: int
    dropout: Callable[[Tensor], Tensor] | None = None
    bias: Tensor | None = None


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[LowRankTerm], splits: Sequence[int]
) -> list[Tensor]:
    """Apply the layer and cut its output.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.
        terms: low-rank terms; each spans one of the parts or all of them.
        splits: widths of the parts, together `out`.

    Returns:
        The parts, (..., width) each. Parts without a term are views of one tensor.
    """
    y = F.linear(x, weight, bias)
    out = weight.shape[0]
    down = _down(x, terms)
    for term, h in zip(terms, down, strict=True):
        if (term.start, term.stop) == (0, out):
            y = _up(y, h, term)
    if len(splits) == 1:
        return [y]
    parts = list(y.split(list(splits), dim=-1))
    starts = [sum(splits[:i]) for i in range(len(splits))]
    for term, h in zip(terms, down, strict=True):
        if (term.start, term.stop) != (0, out):
            index = starts.index(term.start)
            parts[index] = _up(parts[index], h, term)
    return parts


def _down(x: Tensor, terms: Sequence[LowRankTerm]) -> list[Tensor]:
    """x A^T of every term; terms that see the same x share one product."""
    if len(terms) > 1 and all(term.dropout is None for term in terms):
        stacked = F.linear(x, torch.cat([term.a for term in terms]).to(x.dtype))
        return list(stacked.split([term.a.shape[0] for term in terms], dim=-1))
    return [F.linear(x if t.dropout is None else t.dropout(x), t.a.to(x.dtype)) for t in terms]


def _up(y: Tensor, h: Tensor, term: LowRankTerm) -> Tensor:
    """y + scale * (h B^T + bias), rounded once."""
    b = term.b.to(h.dtype)
    flat = torch.addmm(y.flatten(0, -2), h.flatten(0, -2), b.t(), alpha=term.scale)
    y = flat.view(*y.shape[:-1], flat.shape[-1])
    return y if term.bias is None else y + term.scale * term.bias.to(y.dtype)
