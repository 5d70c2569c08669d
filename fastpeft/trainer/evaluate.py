"""Accuracy of a split, over all ranks, each image once."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from fastpeft.metrics import Top1


@torch.no_grad()
def evaluate(
    forward: Callable[[torch.Tensor], torch.Tensor],
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
    advance: Callable[[int], None] = lambda images: None,
) -> Top1:
    """Run a split and return the counts of all ranks; collective.

    Args:
        forward: From images (or features) to logits, in evaluation mode.
        batches: This rank's share.
        device: Where the counts are kept.
        advance: Called with the images done.
    """
    counts = Top1(device)
    for inputs, labels in batches:
        counts.update(forward(inputs.to(device)), labels.to(device))
        advance(len(labels))
    return counts.reduce()
