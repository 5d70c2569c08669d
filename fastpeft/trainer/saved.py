"""Bytes that autograd keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class SavedBytes:
    """Counts what is kept inside a `with` block, each storage once.

    The graph has to outlive the block: what it gives back before may be counted as one with what comes after.

    Attributes:
        total: Bytes so far.
    """

    def __init__(self, own: Iterable[Tensor]) -> None:
        """Count nothing yet.

        Args:
            own: What is there anyway, parameters and buffers, and is not counted.
        """
        self._seen = {_storage(tensor) for tensor in own}
        self.total = 0
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def megabytes(self) -> float:
        """The total in 2**20 bytes, as results have it."""
        return round(self.total / 2**20, 3)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage not in self._seen:
            self._seen.add(storage)
            self.total += tensor.untyped_storage().nbytes()
        # Not the tensor itself: what a function saves of its own results would hold the graph that holds it, and with
        # it every activation and weight, for as long as the process lives.
        return tensor.detach()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
