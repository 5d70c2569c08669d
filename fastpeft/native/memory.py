"""Large tensors from memory that is kept between steps.

A training step asks for the same sizes again and again. What the C library gives back to the system at every free
comes back as pages of zeros, each at the price of a fault: for the activations of a block that is as long as a product.
Here it stays, in pages of 2 MiB where the system has them, until its size has not been asked for in a long time.
"""

from __future__ import annotations

import collections
import mmap
import threading
import weakref

import torch
from torch import Tensor

# Smaller tensors are torch's own.
_SMALLEST = 1 << 20
_PAGE = 2 << 20
_LINE = 64
# Of an arena's mappings; a block of ViT-B has 27 MiB of packed weights.
_MAPPING = 32 << 20
# Pieces that lay unused while so many others were asked for are of shapes that are over. A training step of a large
# model asks for several hundred.
_STALE = 4096


class Pool:
    """Memory by size. A piece returns when the last tensor that looks into it is gone."""

    def __init__(self) -> None:
        # By size, in the order of their return, with the count of requests until then.
        self._free: dict[int, collections.deque[tuple[int, mmap.mmap]]] = {}
        self._used: dict[int, mmap.mmap] = {}
        self._requests = 0

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor on the CPU."""
        count = 1
        for size in shape:
            count *= size
        size = count * dtype.itemsize
        if size < _SMALLEST:
            return torch.empty(shape, dtype=dtype)
        rounded = -(-size // _PAGE) * _PAGE
        self._requests += 1
        try:
            _, memory = self._free[rounded].pop()
        except (KeyError, IndexError):
            self._forget()
            memory = _map(rounded)
        view = memoryview(memory)
        self._used[id(view)] = memory
        weakref.finalize(view, self._release, id(view), rounded).atexit = False
        return torch.frombuffer(view, dtype=dtype, count=count).view(shape)

    def _release(self, name: int, size: int) -> None:
        # May run in any thread, wherever the last reference goes; every step of it is atomic.
        self._free.setdefault(size, collections.deque()).append((self._requests, self._used.pop(name)))

    def _forget(self) -> None:
        """Give pieces back to the system that nobody has wanted for long."""
        for pieces in list(self._free.values()):
            try:
                while self._requests - pieces[0][0] > _STALE:
                    pieces.popleft()
            except IndexError:
                pass

    def clear(self) -> None:
        """Give what is not in use back to the system."""
        self._free.clear()

    @property
    def free_bytes(self) -> int:
        """Memory that waits for the next step."""
        return sum(size * len(pieces) for size, pieces in list(self._free.items()))


class Arena:
    """Memory for what stays, one piece after another in large mappings: packed weights, which products stride through.

    A mapping goes back to the system with the last tensor in it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._view: memoryview | None = None
        self._used = 0

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor on the CPU."""
        count = 1
        for size in shape:
            count *= size
        size = -(-count * dtype.itemsize // _LINE) * _LINE
        if size < _SMALLEST:
            return torch.empty(shape, dtype=dtype)
        with self._lock:
            if self._view is None or self._used + size > len(self._view):
                self._view, self._used = memoryview(_map(max(_MAPPING, -(-size // _PAGE) * _PAGE))), 0
            piece = self._view[self._used : self._used + size]
            self._used += size
        return torch.frombuffer(piece, dtype=dtype, count=count).view(shape)


def _map(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # a kernel without them
            pass
    return memory


pool = Pool()
arena = Arena()
