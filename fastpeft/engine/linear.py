"""Calling a linear layer that may be plain, slice by slice, adapted, hooked or somebody else's."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from torch import Tensor, nn

from fastpeft.engine.hooks import has_hooks
from fastpeft.ops.lora_linear import LowRankTerm, lora_linear

# A reader takes a wrapped linear layer apart: (plain layer, terms beside it), or None where it cannot, and the layer is
# then called as a module. It is asked at every call, since adapters may have been switched in between.
Reader = Callable[[nn.Module], "tuple[nn.Linear, list[LowRankTerm]] | None"]
_readers: dict[type, tuple[Reader, Callable[[nn.Module], str], Callable[[nn.Module], Hashable]]] = {}


def register_reader(
    kind: type, reader: Reader, explain: Callable[[nn.Module], str], folded: Callable[[nn.Module], Hashable]
) -> None:
    """Teach the engine to look inside linear layers of exactly this class.

    Args:
        kind: the class.
        reader: takes a layer apart.
        explain: why the reader gave None for a layer, as a sentence without a full stop.
        folded: what the library has added to the plain layer's weight by now, other than None. It may have done so
            without a trace in the weight's version and address.
    """
    _readers[kind] = (reader, explain, folded)


def is_plain(module: nn.Module) -> bool:
    """An nn.Linear with nn.Linear's own forward, a dense weight of its own, and nobody who listens."""
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and "parametrizations" not in module._modules
        and type(module.weight) in (nn.Parameter, Tensor)
        and not has_hooks(module)
    )


def why_not_plain(module: nn.Module) -> str:
    """Why a layer is not plain, as the rest of a sentence about it."""
    if has_hooks(module):
        return "carries hooks or a replaced forward"
    if "parametrizations" in module._modules:
        return "has a parametrised weight"
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return f"stores its weight as a {type(module.weight).__name__}"
    return f"is a {type(module).__module__}.{type(module).__name__}"


def read(module: nn.Module) -> tuple[nn.Linear, list[LowRankTerm]] | None:
    """The plain layer and the low-rank terms that the module consists of, or None for one that must be called."""
    if is_plain(module):
        return module, []
    known = _readers.get(type(module))
    if known is None or has_hooks(module):
        return None
    return known[0](module)


def folded(module: nn.Module) -> Hashable:
    """What another library has added to the weight of a layer that it wrapped; None for a layer that is not wrapped."""
    known = _readers.get(type(module))
    return None if known is None else known[2](module)


def why_opaque(module: nn.Module) -> str | None:
    """Why a layer is called as a module instead of being fused, or None if it is fused."""
    if read(module) is not None:
        return None
    if type(module) in _readers and not has_hooks(module):
        return _readers[type(module)][1](module)
    return f"it {why_not_plain(module)}, which is called as a module"


def project(
    module: nn.Module,
    x: Tensor,
    splits: Sequence[int],
    terms: Sequence[LowRankTerm],
    first: int,
    last: int,
    backend: str = "auto",
) -> list[Tensor]:
    """Apply a range of the parts of a linear layer.

    Args:
        module: the layer, plain or wrapped.
        x: (..., in).
        splits: widths of all parts.
        terms: the method's low-rank terms, in columns of the whole layer.
        first: first part to compute.
        last: one behind the last part to compute.
        backend: of lora_linear.

    Returns:
        The parts first..last, (..., width) each.
    """
    start, stop = sum(splits[:first]), sum(splits[:last])
    found = read(module)
    if found is None:
        # A layer with a forward of its own gives all parts; what the method adds is added to them.
        return _add_terms(module(x), x, splits, terms, first, last)
    layer, own = found
    terms = [*own, *terms]
    weight, bias = layer.weight, layer.bias
    if (first, last) != (0, len(splits)):
        weight = weight[start:stop]
        bias = None if bias is None else bias[start:stop]
        terms = [cut for cut in [_cut(term, start, stop) for term in terms] if cut is not None]
    if bias is not None and bias.dtype != weight.dtype:
        bias = bias.to(weight.dtype)
    return lora_linear(x, weight, bias, terms, splits[first:last], backend)


def _cut(term: LowRankTerm, start: int, stop: int) -> LowRankTerm | None:
    """The part of a term that lies in output columns start..stop, in columns counted from start."""
    low, high = max(term.start, start), min(term.stop, stop)
    if low >= high:
        return None
    rows = slice(low - term.start, high - term.start)
    bias = None if term.bias is None else term.bias[rows]
    return term._replace(b=term.b[rows], start=low - start, stop=high - start, bias=bias)


def _add_terms(
    y: Tensor, x: Tensor, splits: Sequence[int], terms: Sequence[LowRankTerm], first: int, last: int
) -> list[Tensor]:
    parts = list(y.split(list(splits), dim=-1))
    for index in range(first, last):
        start = sum(splits[:index])
        for term in terms:
            cut = _cut(term, start, start + splits[index])
            if cut is not None:
                h = nn.functional.linear(x if cut.dropout is None else cut.dropout(x), cut.a.to(x.dtype))
                parts[index] = parts[index] + cut.scale * nn.functional.linear(h, cut.b.to(h.dtype))
    return parts[first:last]
