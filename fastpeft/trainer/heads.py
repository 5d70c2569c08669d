"""How a classifier head starts."""

from __future__ import annotations

import math

import torch
from torch import nn

# The bias at which every class starts with a predicted probability of one in a hundred.
PRIOR = 0.01


@torch.no_grad()
def initialise(head: list[tuple[str, nn.Parameter]], num_classes: int, seed: int) -> None:
    """Start a head as the VPT code does: Kaiming-normal (fan-out) matrices, and the last bias at the prior's logit.

    Normalisation weights and hidden biases keep what their layers gave them.

    Args:
        head: The head's named parameters, as `fastpeft.parameter_groups` gives them.
        num_classes: Outputs of the last layer.
        seed: Of the matrices.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in head:
        if parameter.ndim == 2:
            std = math.sqrt(2.0 / parameter.shape[0])
            values = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(values)
        elif name.endswith("bias") and parameter.shape == (num_classes,):
            parameter.fill_(-math.log((1 - PRIOR) / PRIOR))
