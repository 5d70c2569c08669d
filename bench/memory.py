"""Memory of a training step, measured three ways.

- `saved_bytes`: what autograd keeps for the backward pass, each storage counted once, parameters and buffers left out;
- `cuda_peak`: the most the CUDA allocator held during a call, less what it held before;
- `ResidentPeak`: the most memory the process occupied during a block, less what it occupied before. The operating
  system never forgets a peak of another variant, so such a figure comes from a process of its own: `in_subprocess`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from fastpeft.trainer.memory import forget_peak, peak_resident, resident
from fastpeft.trainer.saved import SavedBytes

_ROOT = Path(__file__).resolve().parents[1]
# Of glibc's malloc.h; the size is its own first choice, which it raises unless told one.
_M_MMAP_THRESHOLD, _LARGE = -3, 128 * 2**10


def saved_bytes(function: Callable[[], object], model: nn.Module) -> int:
    """Return the bytes that autograd keeps for backward while `function` runs a forward pass of `model`."""
    with SavedBytes((*model.parameters(), *model.buffers())) as saved:
        kept = function()  # the graph has to live until the count is done, or storages are freed and reused
    del kept
    return saved.total


def cuda_peak(function: Callable[[], object], device: torch.device | str) -> int:
    """Return the bytes that the CUDA allocator held at most during a call, beyond those held before it."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def own_pages() -> bool:
    """Have the C library take every large block from the system and give it back when freed, in this process for good.

    By default glibc's heap keeps freed blocks and cuts later ones from them; what it then holds beyond what is in use
    differs from process to process by as much as two implementations do. A figure after this is of memory in use.

    Returns:
        Whether the C library has such a setting: glibc has.
    """
    if sys.platform != "linux":
        return False
    setting = getattr(ctypes.CDLL(None), "mallopt", None)
    return setting is not None and setting(_M_MMAP_THRESHOLD, _LARGE) == 1


class ResidentPeak:
    """Peak resident memory of this process inside a `with` block, less what was resident at its start.

    Attributes:
        bytes: The figure, after the block.
    """

    def __enter__(self) -> ResidentPeak:
        gc.collect()
        if sys.platform == "linux":
            # Give back what loading the model has freed; otherwise the block would reuse it unseen. glibc only.
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if trim is not None:
                trim(0)
            if not forget_peak():
                raise OSError(
                    "/proc/self/clear_refs cannot be written: the peak of this block cannot be told from others"
                )
        self._before = resident()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bytes = peak_resident() - self._before


def in_subprocess(module: str, *arguments: str) -> dict[str, object]:
    """Run `python -m module arguments` in a process of its own and return the JSON object on its last line.

    Raises:
        RuntimeError: The process failed; the message ends with its own last words.
    """
    command = [sys.executable, "-m", module, *arguments]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(":")}
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise RuntimeError(f"`{' '.join(command[1:])}` ended with status {done.returncode}:\n{tail}")
    return json.loads(done.stdout.strip().splitlines()[-1])
