"""What each method trains, and which modules sleep meanwhile."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

_HEADS = ("head.", "head_dist.")
_NEW_TENSORS = (".vpt.", ".prefix.", ".lora.", ".adapter.", ".serial_adapter.", ".parallel_adapter.")


def choose_trainable(model: nn.Module, methods: Iterable[Any], *, train_head: bool) -> None:
    """Set `requires_grad` of every parameter: the union of what the methods train, and the head if asked."""
    methods = list(methods)
    for name, parameter in model.named_parameters():
        if name.startswith(_HEADS):
            trained = train_head
        elif name.startswith("blocks.") and any(part in name for part in _NEW_TENSORS):
            trained = True
        else:
            trained = any(_trains(method, name, len(model.blocks)) for method in methods)
        parameter.requires_grad_(trained)


def _trains(method: Any, name: str, depth: int) -> bool:
    """Tell whether a method trains this backbone parameter."""
    if method.name == "full":
        return True
    if method.name == "bitfit":  # every shift: projections, feed-forward, LayerNorms, patch embedding
        return name.rsplit(".", 1)[-1].endswith("bias")
    if method.name == "partial":  # the last k blocks and the final norm
        last = tuple(f"blocks.{index}." for index in range(depth - method.k, depth))
        return name.startswith((*last, "norm.", "fc_norm."))
    return False


def silence_backbone_dropout(model: nn.Module) -> None:
    """Keep the backbone in evaluation mode while the method trains: its dropout and stochastic depth never act."""
    for name, module in model.named_modules():
        if name.startswith(("head.", "head_dist.")) or name.endswith("head_drop"):
            continue
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif type(module).__name__ == "DropPath":
            module.drop_prob = 0.0
        elif type(module).__name__ == "PatchDropout":
            module.prob = 0.0
