"""Layers of Hugging Face peft; LoRA on a plain linear layer is what the engine can look into.

Numerics. peft keeps fp32 factors on a model of lower precision (`autocast_adapter_dtype`): it casts x up, multiplies by
the factors in fp32, adds, and rounds the sum. The engine casts the factors down, which are small, and leaves x, which
is large, as it is: every product is summed in fp32 and rounded once, behind A, and behind the addition to the base's
output. Both round that sum, which is the larger error. Gradients of the factors are rounded to the model's precision
before they reach the fp32 masters. Factors of lower precision than the model are cast up, where peft casts x down.
Where all have one type the two differ by the order of summation only.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastpeft.engine.linear import is_plain, register_reader, why_not_plain
from fastpeft.ops.lora_linear import LowRankTerm

REQUIRES = "peft.tuners.lora.layer"


def register() -> None:
    """Let the engine look inside `peft.tuners.lora.layer.Linear`."""
    from peft.tuners.lora.layer import Linear

    register_reader(Linear, read, explain, folded)


def wrapped(model: nn.Module) -> list[tuple[str, str]]:
    """peft's layers in a model, of every tuner, and its copies of whole modules: (path, description)."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import other

    # Releases before 0.15 know but one such copy.
    kinds = (BaseTunerLayer, getattr(other, "AuxiliaryTrainingWrapper", other.ModulesToSaveWrapper))
    found: list[tuple[str, str]] = []
    for path, module in model.named_modules():
        if isinstance(module, kinds) and not (found and path.startswith(found[-1][0] + ".")):
            found.append((path, f"a {type(module).__module__}.{type(module).__name__}"))
    return found


def explain(layer: nn.Module) -> str:
    """What about the layer is not plain LoRA on a plain linear layer."""
    if not is_plain(layer.base_layer):
        return f"its base layer {why_not_plain(layer.base_layer)}"
    if layer.fan_in_fan_out:
        return "its weight is stored transposed (fan_in_fan_out)"
    if layer.disable_adapters:
        return "it is merged and disabled; peft unmerges it at its next forward"
    for name in layer.active_adapters:
        variant = getattr(layer, "lora_variant", {}).get(name)
        if variant is not None:
            return f"adapter {name!r} is peft's {type(variant).__name__.removesuffix('LinearVariant')}, not plain LoRA"
        if name in layer.lora_A and isinstance(layer.scaling[name], Tensor):
            return f"the scale of adapter {name!r} is a tensor, as peft's hot-swapping prepares it"
    return "its factors or its dropout are not peft's plain layers"


def read(layer: nn.Module) -> tuple[nn.Linear, list[LowRankTerm]] | None:
    """The base layer and a term for every active adapter, as peft's own forward would use them now."""
    if not is_plain(layer.base_layer) or layer.fan_in_fan_out:
        return None
    if layer.disable_adapters:
        # peft unmerges on the way; its own forward does that.
        return None if layer.merged else (layer.base_layer, [])
    if layer.merged:
        return layer.base_layer, []
    terms = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        a, b, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        plain = is_plain(a) and is_plain(b) and a.bias is None and type(dropout) in (nn.Identity, nn.Dropout)
        if name in getattr(layer, "lora_variant", {}) or not plain or isinstance(layer.scaling[name], Tensor):
            return None
        drop = _active(dropout, a.weight)
        terms.append(LowRankTerm(a.weight, b.weight, layer.scaling[name], 0, b.out_features, drop, b.bias))
    return layer.base_layer, terms


def folded(layer: nn.Module) -> tuple[str, ...]:
    """The adapters that are merged: peft adds them to `weight.data`, where nothing counts changes."""
    return tuple(layer.merged_adapters)


def _active(dropout: nn.Module, factor: Tensor) -> Callable[[Tensor], Tensor] | None:
    """The dropout on a term's input, or None if it does nothing now.

    Random numbers are drawn in the factor's type, as peft does: the same seed gives other masks in another type.
    """
    if isinstance(dropout, nn.Identity) or not (dropout.training and dropout.p > 0):
        return None
    dtype = factor.dtype
    return lambda x: dropout(x.to(dtype)).to(x.dtype)
