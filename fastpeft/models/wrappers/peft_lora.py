"""LoRA layers of Hugging Face peft."""

from __future__ import annotations

from torch import nn

from fastpeft.engine.linear import is_plain, register_reader
from fastpeft.ops.lora_linear import LowRankTerm

REQUIRES = "peft.tuners.lora.layer"


def register() -> None:
    """Let the engine look inside `peft.tuners.lora.layer.Linear`."""
    from peft.tuners.lora.layer import Linear

    register_reader(Linear, read, explain)


def explain(layer: nn.Module) -> str:
    """What about the layer is not plain LoRA on a plain linear layer."""
    if not is_plain(layer.base_layer):
        return f"its base layer is a {type(layer.base_layer).__name__}, possibly with hooks"
    variants = sorted({type(v).__name__ for v in getattr(layer, "lora_variant", {}).values()})
    if variants:
        return f"peft's {', '.join(variants)} is not plain LoRA"
    return "peft is merging or mixing adapters in it"


def read(layer: nn.Module) -> tuple[nn.Linear, list[LowRankTerm]] | None:
    """The base layer and a term for every active adapter, as peft's own forward would use them now."""
    if not is_plain(layer.base_layer):
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
        if name in getattr(layer, "lora_variant", {}) or not (is_plain(a) and is_plain(b)) or layer.fan_in_fan_out:
            return None
        idle = isinstance(dropout, nn.Identity) or not (dropout.training and dropout.p > 0)
        terms.append(
            LowRankTerm(a.weight, b.weight, layer.scaling[name], 0, b.out_features, None if idle else dropout, b.bias)
        )
    return layer.base_layer, terms
