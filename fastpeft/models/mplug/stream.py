"""Hidden states on their way through the model, and what a decoder keeps of the tokens it has seen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Stream(NamedTuple):
    """Hidden states.

    Attributes:
        states: (B, N, D).
        mask: bool (B, N), True where there is something; None where that is everywhere.
    """

    states: Tensor
    mask: Tensor | None = None

    def repeat(self, counts: Tensor) -> Stream:
        """Sample i counts[i] times, one behind the other."""
        mask = None if self.mask is None else self.mask.repeat_interleave(counts, 0)
        return Stream(self.states.repeat_interleave(counts, 0), mask)


def join(first: Stream, second: Stream) -> Stream:
    """The rows of two streams one behind the other."""
    mask = None
    if first.mask is not None or second.mask is not None:
        mask = torch.cat((_written_out(first), _written_out(second)), 1)
    return Stream(torch.cat((first.states, second.states), 1), mask)


def _written_out(stream: Stream) -> Tensor:
    if stream.mask is not None:
        return stream.mask
    return torch.ones(stream.states.shape[:2], dtype=torch.bool, device=stream.states.device)


@dataclass
class LayerCache:
    """Keys and values that a decoder layer has computed.

    Attributes:
        k, v: of the tokens, (B, H, M, D), or None before the first.
        memory_k, memory_v: of the memory, (B, H, N, D), or None before the first.
    """

    k: Tensor | None = None
    v: Tensor | None = None
    memory_k: Tensor | None = None
    memory_v: Tensor | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, H, n, D) behind those there are; all of them."""
        if self.k is not None:
            k, v = torch.cat((self.k, k), 2), torch.cat((self.v, v), 2)
        self.k, self.v = k, v
        return k, v


@dataclass
class DecoderCache:
    """What `decode` keeps from call to call.

    Attributes:
        layers: one for each layer.
        length: tokens that it has seen.
        mask: bool (B, length and prompts), which keys are real; None for all.
        memory_mask: bool (B, N), of the memory; None for all.
    """

    layers: list[LayerCache] = field(default_factory=list)
    length: int = 0
    mask: Tensor | None = None
    memory_mask: Tensor | None = None

    def reorder(self, index: Tensor) -> None:
        """Keep these rows, in this order.

        Args:
            index: int64, any number of positions in the present batch, some perhaps twice.
        """
        self.reorder_text(index)
        self.reorder_memory(index)

    def reorder_text(self, index: Tensor) -> None:
        """The same for the tokens alone: rows that lie side by side may share a row of the memory, all as many."""
        self._reorder(index, ("k", "v"), "mask")

    def reorder_memory(self, index: Tensor) -> None:
        """The same for the memory alone."""
        self._reorder(index, ("memory_k", "memory_v"), "memory_mask")

    def _reorder(self, index: Tensor, names: tuple[str, str], mask: str) -> None:
        for owner, name in [*((layer, name) for layer in self.layers for name in names), (self, mask)]:
            t = getattr(owner, name)
            if t is not None:
                setattr(owner, name, t.index_select(0, index))
