"""`fold_prefix`: replace the network that a prefix was trained through by what it says."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from fastpeft.engine.extensions import Extension, FixedKeyValues, Prompts
from fastpeft.errors import MethodError
from fastpeft.methods.base import Methods
from fastpeft.methods.prefix import MLPKeyValues, MLPPrompts, PrefixTuning
from fastpeft.parameters import outermost, view_of
from fastpeft.patch import record_of


@torch.no_grad()
def fold_prefix(model: nn.Module) -> nn.Module:
    """Turn a prefix with a re-parameterisation into the same prefix without one, in place.

    The function stays the same but for rounding. The model then carries `PrefixTuning(..., mlp=None)`: a prefix like
    any other, that can be saved, trained further with another optimizer, and merged. Whether its tensors are trained is
    as it was for the network's.

    Returns:
        The same model.

    Raises:
        MethodError: the model carries no prefix with a network, or its method was merged.
    """
    record = record_of(model)
    parts = () if record is None or record.method is None else record.method.parts()
    if not any(isinstance(part, PrefixTuning) and part.mlp is not None for part in parts):
        raise MethodError("the model carries no prefix with a network to fold, such as PrefixTuning(16, mlp=512)")
    if record.merged is not None:
        raise MethodError("the model's method was merged, and the network with it")
    ((_, host),) = outermost(model)
    for block in view_of(host).every_block():
        extension = block.module._modules.get(PrefixTuning.name)
        plain = _plain(extension)
        if plain is not None:
            trained = any(parameter.requires_grad for parameter in extension.parameters())
            block.module._modules[PrefixTuning.name] = plain.requires_grad_(trained).train(extension.training)
    folded = tuple(dataclasses.replace(part, mlp=None) if isinstance(part, PrefixTuning) else part for part in parts)
    record.method = folded[0] if len(folded) == 1 else Methods(folded)
    return model


def _plain(extension: Extension | None) -> Extension | None:
    """What an extension's network says, as the extension without one; None if it has none."""
    if isinstance(extension, MLPPrompts):
        rows = extension.mlp(extension.prompts)
        return Prompts(nn.Parameter(rows.clone()), extension.length)
    if isinstance(extension, MLPKeyValues):
        return FixedKeyValues(*(t.clone() for t in extension.keys_values()))
    return None
