"""Accuracy of a split, over all ranks, each image once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from fastpeft.metrics import Top1


@dataclass(frozen=True)
class Spare:
    """Something to run for ranks that have nothing left while others have.

    Attributes:
        inputs: a batch of one.
        rounds: forward passes of the rank with the most batches.
    """

    inputs: torch.Tensor
    rounds: int


@torch.no_grad()
def evaluate(
    forward: Callable[[torch.Tensor], torch.Tensor],
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
    advance: Callable[[int], None] = lambda images: None,
    spare: Spare | None = None,
) -> Top1:
    """Run a split and return the counts of all ranks; collective.

    Args:
        forward: From images (or features) to logits, in evaluation mode.
        batches: This rank's share.
        device: Where the counts are kept.
        advance: Called with the images done.
        spare: Run, and not counted, until every rank has called `forward` equally often; None if that does not matter.
    """
    counts, calls = Top1(device), 0
    for inputs, labels in batches:
        counts.update(forward(inputs.to(device)), labels.to(device))
        advance(len(labels))
        calls += 1
    for _ in range(calls, 0 if spare is None else spare.rounds):
        forward(spare.inputs.to(device))
    return counts.reduce()
