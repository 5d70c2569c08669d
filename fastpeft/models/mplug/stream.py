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


class GrowingRows:
    """Keys or values of the tokens so far, in a tensor with room for more of them.

    Tensors of another size at every token would come from the system afresh, whose empty pages cost more time than what
    is written into them: rows are added in place, and two tensors take turns when samples change places.

    Attributes:
        rows: (B, H, M, D), or None before the first.
    """

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self._room: Tensor | None = None
        self._spare: Tensor | None = None

    def extend(self, new: Tensor) -> Tensor:
        """Add (B, H, n, D) behind those there are; all of them."""
        if self.rows is None:
            self.rows = new
        elif torch.is_grad_enabled() and (new.requires_grad or self.rows.requires_grad):
            self.rows = torch.cat((self.rows, new), 2)
            self._room = self._spare = None
        else:
            begin, end = self.rows.shape[2], self.rows.shape[2] + new.shape[2]
            if not _fits(self._room, len(new), end):
                self._room = _empty(new, len(new), end)
                self._room[:, :, :begin] = self.rows
            self._room[:, :, begin:end] = new
            self.rows = self._room[:, :, :end]
        return self.rows

    def reorder(self, index: Tensor) -> None:
        """Keep these samples, in this order."""
        if self.rows is None:
            return
        if self._room is None or (torch.is_grad_enabled() and self.rows.requires_grad):
            self.rows, self._room = self.rows.index_select(0, index), None
            return
        count = self.rows.shape[2]
        target = self._spare if _fits(self._spare, len(index), count) else _empty(self.rows, len(index), count)
        torch.index_select(self.rows, 0, index, out=target[:, :, :count])
        self._room, self._spare = target, self._room
        self.rows = target[:, :, :count]


def _fits(room: Tensor | None, samples: int, rows: int) -> bool:
    """Whether so much can be written there: a tensor of inference mode is closed outside of it."""
    if room is None or len(room) != samples or room.shape[2] < rows:
        return False
    return torch.is_inference_mode_enabled() or not room.is_inference()


def _empty(like: Tensor, samples: int, rows: int) -> Tensor:
    """(samples, H, a power of two from 8 on that is at least `rows`, D)."""
    room = max(8, 1 << (rows - 1).bit_length())
    return like.new_empty(samples, like.shape[1], room, like.shape[3])


class LayerCache:
    """Keys and values that a decoder layer has computed.

    Attributes:
        memory_k, memory_v: of the memory, (B, H, N, D), or None before the first.
    """

    def __init__(self, memory_k: Tensor | None = None, memory_v: Tensor | None = None):
        self.memory_k, self.memory_v = memory_k, memory_v
        self._keys, self._values = GrowingRows(), GrowingRows()

    @property
    def k(self) -> Tensor | None:
        """Keys of the tokens, (B, H, M, D), or None before the first."""
        return self._keys.rows

    @property
    def v(self) -> Tensor | None:
        """The same of the values."""
        return self._values.rows

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values (B, H, n, D) behind those there are; all of them."""
        return self._keys.extend(k), self._values.extend(v)

    def reorder(self, index: Tensor) -> None:
        """Keep the tokens of these samples, in this order."""
        self._keys.reorder(index)
        self._values.reorder(index)


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
        for layer in self.layers:
            layer.reorder(index)
        self.mask = _selected(self.mask, index)

    def reorder_memory(self, index: Tensor) -> None:
        """The same for the memory alone."""
        for layer in self.layers:
            layer.memory_k, layer.memory_v = _selected(layer.memory_k, index), _selected(layer.memory_v, index)
        self.memory_mask = _selected(self.memory_mask, index)


def _selected(t: Tensor | None, index: Tensor) -> Tensor | None:
    return None if t is None else t.index_select(0, index)
