"""Searches on ranks that have to call the model equally often, because a call gathers weights from all of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastpeft.models.mplug import DecoderCache, Stream


class Lockstep:
    """Counts a search's calls of the decoder, and makes up those that it did without.

    To a search it is the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config = model.config
        self.training = model.training
        self._calls = 0

    def decode(self, ids: Tensor, mask: Tensor | None, memory: Stream | None, cache: DecoderCache) -> Tensor:
        """As the model's."""
        self._calls += 1
        return self.model.decode(ids, mask, memory, cache)

    def fill_up(self, calls: int) -> None:
        """Call the decoder for nothing until there have been so many calls."""
        weight = next(self.model.parameters())
        states = torch.zeros(1, 1, self.config.width, device=weight.device)
        ids = torch.zeros(1, 1, dtype=torch.int64, device=weight.device)
        while self._calls < calls:
            self.decode(ids, None, Stream(states), DecoderCache())
