"""What each method trains, and which modules sleep meanwhile."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

# How the names of the head's parameters start, and what the names of a method's tensors in a block contain.
HEADS = ("head.", "head_dist.")
NEW_TENSORS = (".vpt.", ".prefix.", ".lora.", ".adapter.", ".serial_adapter.", ".parallel_adapter.")


def choose_trainable(model: nn.Module, methods: Iterable[Any], *, train_head: bool) -> None:
    """Set `requires_grad` of every parameter: the union of what the methods train, and the head if asked."""
    methods = list(methods)
    for name, parameter in model.named_parameters():
        if name.startswith(HEADS):
            trained = train_head
        elif name.startswith("blocks.") and any(part in name for part in NEW_TENSORS):
            fixed = any(method.name == "vpt" and not method.trained for method in methods)
            trained = not (fixed and ".vpt." in name)
        else:
            trained = any(_trains(method, name, len(model.blocks)) for method in methods)
        parameter.requires_grad_(trained)


def _trains(method: Any, name: str, depth: int) -> bool:
    """Tell whether a method trains this backbone parameter."""
    if method.name == "full":
        return True
    if method.name == "bitfit":  # every shift: projections, feed-forward, LayerNorms, patch embedding
        return name.rsplit(".", 1)[-1].endswith("bias")
    if method.name == "class_token":  # the tokens that the head reads
        return name in ("cls_token", "dist_token")
    if method.name == "partial":  # the last k blocks and what follows them, up to the head
        last = tuple(f"blocks.{index}." for index in range(depth - method.k, depth))
        return name.startswith((*last, "norm.", "attn_pool.", "fc_norm."))
    return False


def silence_backbone_dropout(model: nn.Module) -> None:
    """Keep all but the method and the head in evaluation mode for good: dropout and stochastic depth never act."""
    new = tuple(part.strip(".") for part in NEW_TENSORS)
    for name, module in model.named_modules():
        if name.startswith(HEADS) or any(part in name.split(".") for part in new):
            continue
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif type(module).__name__ == "DropPath":
            module.drop_prob = 0.0
        elif type(module).__name__ == "PatchDropout":
            module.prob = 0.0
