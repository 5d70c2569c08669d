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
        The parts, (..., width) each, views of one tensor.
    """
    rows = x.flatten(0, -2)
    y = F.linear(rows, weight, _bias(bias, terms, weight))
    if terms:
        # In place: the frozen product's backward does not need its output, and a second tensor of this size would be
        # kept alive beside the first by whatever part has no term.
        scale = terms[0].scale if len({term.scale for term in terms}) == 1 else None
        up = _up(terms, weight.shape[0], scale).to(y.dtype)
        y.addmm_(_down(rows, x, terms), up, alpha=1.0 if scale is None else scale)
    return list(y.view(*x.shape[:-1], weight.shape[0]).split(list(splits), dim=-1))


def _down(rows: Tensor, x: Tensor, terms: Sequence[LowRankTerm]) -> Tensor:
    """x A^T of all terms side by side; terms that see the same x share one product."""
    if all(term.dropout is None for term in terms):
        return F.linear(rows, _stacked([term.a for term in terms], 0).to(x.dtype))
    inputs = [rows if term.dropout is None else term.dropout(x).flatten(0, -2) for term in terms]
    return _stacked([F.linear(h, term.a.to(x.dtype)) for h, term in zip(inputs, terms, strict=True)], 1)


def _up(terms: Sequence[LowRankTerm], out: int, scale: float | None) -> Tensor:
    """B^T of all terms one below the other, zero in the columns that a term does not reach: (sum of r, out).

    Scaled, unless all terms have the one scale that is given.
    """
    blocks = []
    for term in terms:
        b = term.b.t() if scale is not None else term.b.t() * term.scale
        blocks.append(b if (term.start, term.stop) == (0, out) else F.pad(b, (term.start, out - term.stop)))
    return _stacked(blocks, 0)


def _stacked(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _bias(bias: Tensor | None, terms: Sequence[LowRankTerm], weight: Tensor) -> Tensor | None:
    """The layer's bias with the terms' own."""
    for term in terms:
        if term.bias is not None:
            own = F.pad(term.bias * term.scale, (term.start, weight.shape[0] - term.stop)).to(weight.dtype)
            bias = own if bias is None else bias + own
    return bias
