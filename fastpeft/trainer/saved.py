"""Bytes that autograd keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class SavedBytes:
    """Counts what is kept at the end of a `with` block, each storage once.

    The graph has to outlive the block. A part of it that does not, an operation whose result nobody used, is left out.
    """

    def __init__(self, own: Iterable[Tensor]) -> None:
        """Count nothing yet.

        Args:
            own: What is there anyway, parameters and buffers, and is not counted.
        """
        # The storages too: a buffer that the block replaces would leave its address to something that is kept.
        self._own = {_address(tensor): tensor.untyped_storage() for tensor in own}
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self._total: int | None = None
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def total(self) -> int:
        """Bytes kept now, after the block those kept at its end."""
        if self._total is not None:
            return self._total
        return sum(size for storage, size in self._seen.values() if not storage.expired())

    @property
    def megabytes(self) -> float:
        """The total in 2**20 bytes, as results have it."""
        return round(self.total / 2**20, 3)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)
        self._total = self.total
        self._own.clear()
        self._seen.clear()

    def _pack(self, tensor: Tensor) -> Tensor:
        address = _address(tensor)
        # An address says which storage it is only while that lives: the next one may get the same.
        if address not in self._own and (address not in self._seen or self._seen[address][0].expired()):
            storage = tensor.untyped_storage()
            self._seen[address] = (StorageWeakRef(storage), storage.nbytes())
        # Not the tensor itself: what a function saves of its own results would hold the graph that holds it, and with
        # it every activation and weight, for as long as the process lives.
        return tensor.detach()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
