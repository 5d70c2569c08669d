"""Top-1 accuracy and mean cross-entropy, summed over batches and ranks."""

from __future__ import annotations

import torch
import torch.distributed
import torch.nn.functional as F


class Top1:
    """Counts of images, correct predictions and summed loss.

    Each rank updates its own counter with images that no other rank sees; `reduce` adds them up, so nothing is counted
    twice however the images were dealt.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        # float64 keeps counts exact far beyond any dataset and lets one collective carry all three.
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch: `logits` (batch, classes) and integer `labels` (batch,)."""
        logits = logits.detach().float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        correct = (logits.argmax(dim=1) == labels).sum()
        self._sums += torch.stack([torch.full_like(loss, len(labels)), correct.to(loss.dtype), loss]).double()

    def reduce(self) -> Top1:
        """Add the counts of all ranks; collective, and to be called once."""
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(self._sums)
        return self

    @property
    def count(self) -> int:
        """Images seen."""
        return int(self._sums[0])

    @property
    def accuracy(self) -> float:
        """Share of images whose largest logit is the label's."""
        return float(self._sums[1] / self._sums[0]) if self.count else float("nan")

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return float(self._sums[2] / self._sums[0]) if self.count else float("nan")
