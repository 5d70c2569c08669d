"""`merge`: fold a trained method into the model for deployment."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from fastpeft.engine.block import BlockState
from fastpeft.engine.description import child
from fastpeft.engine.extensions import FixedKeyValues, InputPrompts, KeyValues, LowRanks, Prompts
from fastpeft.engine.head import DeepHead
from fastpeft.engine.linear import is_plain
from fastpeft.engine.post_norm import block_run
from fastpeft.engine.view import BlockView
from fastpeft.errors import MethodError
from fastpeft.parameters import outermost, view_of
from fastpeft.patch import record_of

_log = logging.getLogger(__name__)


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Fold a model's method into its weights, in place.

    LoRA is added to the frozen weights, W <- round(W + scale B A), and its tensors go. Prompts become frozen keys and
    values of their block. After that `unpatch` gives a plain model if only LoRA was there.

    Rounding to the weight's precision is an error of the method's contribution: it is measured for each projection as
    |W_merged - W - scale B A| / |scale B A| in float64, logged, and shown by `summary`.

    Returns:
        The same model.

    Raises:
        MethodError: naming what cannot be folded; nothing has been changed then.
    """
    record = record_of(model)
    if record is None or record.method is None:
        raise MethodError("the model carries no method to merge; patch it with one first")
    if record.merged is not None:
        return model
    ((_, host),) = outermost(model)
    blocks = view_of(host).every_block()
    refused = [reason for block in blocks for reason in _refusals(block)]
    refused += [
        f"{path}: hidden layers before the output layer are not linear"
        for path, module in host.named_modules()
        if isinstance(module, DeepHead)
    ]
    if refused:
        raise MethodError("cannot merge: " + "; ".join(refused))
    errors: dict[str, float] = {}
    for block in blocks:
        _merge_block(block, errors)
    record.merged = errors
    if errors:
        worst = max(errors, key=errors.__getitem__)
        _log.info("merged %d projections; worst relative error %.2g (%s)", len(errors), errors[worst], worst)
    model.requires_grad_(False)
    return model


def _refusals(block: BlockView) -> list[str]:
    state: BlockState = block.module.fastpeft_block
    found = []
    if state.carry_out > state.carry_in:
        found.append(f"{block.path}: prompts whose outputs are carried on are rows of every image, not keys and values")
    for name in state.extensions:
        extension = block.module._modules[name]
        if isinstance(extension, LowRanks):
            for role in extension.roles:
                layer = child(block.module, block.spec.roles[role].path)
                if not is_plain(layer):
                    found.append(f"{block.path}.{name}.{role}: its base is a {type(layer).__name__}")
        elif isinstance(extension, InputPrompts):
            found.append(f"{block.path}.{name}: rows before the input of a stack are rows of every text")
        elif not isinstance(extension, (Prompts, KeyValues)):
            found.append(f"{block.path}.{name}: a {type(extension).__name__} is not linear")
    return found


def _merge_block(block: BlockView, errors: dict[str, float]) -> None:
    module, state = block.module, block.module.fastpeft_block
    # Prompts go through the block's projections, so LoRA is folded first.
    for name in list(state.extensions):
        extension = module._modules[name]
        if isinstance(extension, LowRanks):
            for role, pair in extension.roles.items():
                place = block.spec.roles[role]
                weight = child(module, place.path).weight[place.start : place.stop]
                errors[f"{block.path}.{role}"] = fold(weight, *pair.factors(), pair.scale)
            delattr(module, name)
            state.extensions = tuple(n for n in state.extensions if n != name)
    for name in state.extensions:
        extension = module._modules[name]
        if isinstance(extension, (Prompts, KeyValues)):
            module._modules[name] = FixedKeyValues(*_keys_values(module, extension)).requires_grad_(False)


def _keys_values(module: nn.Module, extension: Prompts | KeyValues) -> tuple[Tensor, Tensor]:
    if isinstance(extension, KeyValues):
        k, v = extension.keys_values()
        return k.clone(), v.clone()
    training = extension.training
    rows = extension.train(False).rows(1, next(module.parameters()).dtype, None)
    extension.train(training)
    k, v = block_run(module).prompt_keys_values(rows[0] if rows.dim() == 3 else rows)
    return k.transpose(0, 1).flatten(1).clone(), v.transpose(0, 1).flatten(1).clone()


def fold(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> float:
    """Add scale * b a to a weight in place; the relative error of what was added, in float64."""
    delta = scale * (b.double() @ a.double())
    before = weight.to(torch.float64, copy=True)
    weight.copy_((before + delta).to(weight.dtype))
    size = delta.norm()
    return float((weight.double() - before - delta).norm() / size) if size > 0 else 0.0
