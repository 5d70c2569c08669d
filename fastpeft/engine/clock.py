"""The counter that dropout masks are a function of."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DropoutClock(nn.Module):
    """Seed and step of a model's dropout masks.

    Both are buffers outside of `state_dict()`: they move with the model, `torch.compile` sees tensors rather than
    constants, and DistributedDataParallel keeps them equal over ranks. The rank, which makes the masks of the ranks
    differ, is a plain number for the same reason.

    Attributes:
        seed: int64 scalar.
        step: int64 scalar, the number of training forwards begun.
        rank: position of this process in the data-parallel group.
    """

    seed: Tensor
    step: Tensor

    def __init__(self, seed: int):
        super().__init__()
        self.register_buffer("seed", torch.tensor(seed, dtype=torch.int64), persistent=False)
        self.register_buffer("step", torch.tensor(0, dtype=torch.int64), persistent=False)
        self.rank = 0

    def tick(self) -> Tensor:
        """Begin a training forward; the returned scalar stays as it is while later forwards go on counting."""
        # A new tensor, not an addition in place: a compiled backward may compute masks again from the counter, and a
        # recomputed block draws from the scalar that its forward was given.
        with torch.no_grad():
            self.step = self.step + 1
        return self.step
