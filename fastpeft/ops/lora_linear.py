"""A frozen linear layer with low-rank terms beside it.

    y = x W^T + b,    y[..., s:e] += scale * drop(x) A^T B^T    for every term

The product with W is never repeated and W is never changed; the terms add into its output, in its precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.ops import registered
from fastpeft.ops.autocast import suspended, without_autocast, working
from fastpeft.ops.choose import choose, is_reference, say_once
from fastpeft.ops.split_columns import split_columns


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
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    terms: Sequence[LowRankTerm],
    splits: Sequence[int],
    backend: str = "auto",
) -> list[Tensor]:
    """Apply the layer and cut its output.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.
        terms: low-rank terms; each spans one of the parts or all of them.
        splits: widths of the parts, together `out`.
        backend: "auto" or one of `fastpeft.ops.choose.BACKENDS`; a layer without terms is torch's own product.

    Returns:
        The parts, (..., width) each, views of one tensor.

    Raises:
        BackendError: the backend asked for cannot run.
    """
    if not is_reference("lora_linear", backend, x.device):
        y = _fused(x, weight, bias, terms, backend) if terms else F.linear(x, weight, bias)
        if y is not None:
            return split_columns(y, splits)
    return reference(x, weight, bias, terms, splits)


def _fused(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[LowRankTerm], backend: str) -> Tensor | None:
    """The layer by an implementation, or None if the reference is to run."""
    if any(term.dropout is not None for term in terms):
        # A mask on x of its own for every term is another product, not an epilogue of this one.
        say_once("lora_linear runs on its reference where a term has dropout")
        return None
    frozen = (weight, bias, *(term.bias for term in terms))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in frozen):
        say_once("lora_linear runs on its reference where the layer's own weight or a bias is trained")
        return None
    x, weight, bias = working(x, weight, _bias(bias, terms, weight))
    factors = [t for term in terms for t in (term.a, term.b)]
    shape = [(term.scale, term.start, term.stop) for term in terms]
    if torch.compiler.is_compiling():
        scales, starts, stops = (list(values) for values in zip(*shape, strict=True))
        return registered.lora_linear(x, weight, bias, factors, scales, starts, stops, backend)
    rows = x.flatten(0, -2)
    module = choose("lora_linear", backend, x.device, lambda module: module.reasons(rows, weight, bias, plain(terms)))
    if module is None:
        return None
    with suspended(x.device):
        y = _LoraLinear.apply(rows, weight, bias, shape, module, *factors)
    return y.view(*x.shape[:-1], y.shape[1])


def plain(terms: Sequence[LowRankTerm]) -> list[tuple[Tensor, Tensor, float, int, int]]:
    """(a, b, scale, start, stop) of each term, as implementations take them."""
    return [(t.a, t.b, t.scale, t.start, t.stop) for t in terms]


def terms_from(
    factors: Sequence[Tensor], scales: Sequence[float], starts: Sequence[int], stops: Sequence[int]
) -> list[LowRankTerm]:
    """Terms from what the registered operator is given: a and b of each in turn."""
    shape = zip(scales, starts, stops, strict=True)
    return [LowRankTerm(a, b, *place) for a, b, place in zip(factors[::2], factors[1::2], shape, strict=True)]


class _LoraLinear(torch.autograd.Function):
    """Keeps x and x A^T for the factors' gradients; nothing for the frozen weight's."""

    @staticmethod
    def forward(ctx, x, weight, bias, shape, module: ModuleType, *factors):
        y, h = module.forward(x, weight, bias, plain(_terms(factors, shape)))
        trained = any(ctx.needs_input_grad[5:])
        ctx.save_for_backward(weight, x if trained else None, h if trained else None, *factors)
        ctx.shape, ctx.module, ctx.trained = shape, module, trained
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx, dy: Tensor):
        weight, x, h, *factors = ctx.saved_tensors
        dx, pairs = ctx.module.backward(
            dy,
            x,
            weight,
            plain(_terms(factors, ctx.shape)),
            h,
            needs_x=ctx.needs_input_grad[0],
            needs_factors=ctx.trained,
        )
        found = [None] * len(factors) if pairs is None else [gradient for pair in pairs for gradient in pair]
        kept = [g if need else None for g, need in zip(found, ctx.needs_input_grad[5:], strict=True)]
        return dx, None, None, None, None, *kept


def _terms(factors: Sequence[Tensor], shape: Sequence[tuple[float, int, int]]) -> list[LowRankTerm]:
    return terms_from(factors, *zip(*shape, strict=True))


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[LowRankTerm], splits: Sequence[int]
) -> list[Tensor]:
    """The equation in plain PyTorch. Arguments as of `lora_linear`."""
    if not terms and len(splits) == 1 and x.is_contiguous():
        return [F.linear(x, weight, bias)]
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
