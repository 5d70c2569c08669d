"""One entry point: a plain timm vision transformer and a method in, the textbook implementation out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from bench.literal import adapters, freezing, lora, mlp_head, prefix, vpt
from bench.literal.vit import LiteralBlock, LiteralBlocks

# What each method adds to the model, by the method's name; methods that add nothing only choose what is trained.
_BUILDERS: dict[str, Callable[[nn.Module, Any], None]] = {
    "vpt": vpt.add,
    "prefix": prefix.add,
    "lora": lora.add,
    "adapter": adapters.add_adapter,
    "serial_adapter": adapters.add_serial,
    "parallel_adapter": adapters.add_parallel,
    "mlp_head": mlp_head.add,
    "full": lambda model, method: None,
    "linear": lambda model, method: None,
    "partial": lambda model, method: None,
    "bitfit": lambda model, method: None,
    "class_token": lambda model, method: None,
}


def apply(
    model: nn.Module,
    method: Any,
    *,
    train_head: bool = True,
    prompt_mask: Callable[[int, int], Tensor] | None = None,
    lora_mask: Callable[[int, str, Tensor], Tensor] | None = None,
) -> nn.Module:
    """Turn a plain timm vision transformer into the literal implementation of a tuning method.

    Parameter names, shapes and `requires_grad` equal those of `fastpeft.patch(model, method)`, so that
    `literal.load_state_dict(patched.state_dict())` gives both the same weights.

    Args:
        model: A timm `VisionTransformer` (or its distilled DeiT) as created; changed in place.
        method: A method of fastpeft, or a sum of them. Only its `name` and fields are read.
        train_head: Whether the classification head is trained.
        prompt_mask: Called as `prompt_mask(block_index, batch)` in training mode in place of random prompt dropout;
            returns the multipliers, (batch or 1, length, width).
        lora_mask: Called as `lora_mask(block_index, role, x)` in training mode in place of random LoRA dropout;
            returns the multipliers of x.

    Returns:
        The given model; `forward`, `forward_features` and `forward_head` are the method's.

    Raises:
        TypeError: The model's blocks are not timm's pre-norm `Block`.
        ValueError: A method has no literal implementation.
    """
    methods = getattr(method, "methods", None) or (method,)
    unknown = [m.name for m in methods if m.name not in _BUILDERS]
    if unknown:
        raise ValueError(f"no literal implementation of {unknown}; there is one of {sorted(_BUILDERS)}")

    model.blocks = LiteralBlocks(
        [LiteralBlock(block, index) for index, block in enumerate(model.blocks)],
        first_patch=model.num_prefix_tokens,
    )
    model.blocks.prompt_mask = prompt_mask
    model.blocks.lora_mask = lora_mask
    for m in methods:
        _BUILDERS[m.name](model, m)
    freezing.choose_trainable(model, methods, train_head=train_head)
    if not all(m.name == "full" for m in methods):
        freezing.silence_backbone_dropout(model)
    return model
