"""How much memory a run took at most: resident on the host, allocated on a GPU.

The operating system counts a process's peak from its beginning, so that of several runs in one process each would have
that of the largest so far. Linux can be told to begin anew, and so can CUDA's allocator; elsewhere a host's peak stays
that of the whole process.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# A peak counted from now is what is occupied now, but for what comes and goes while the two are read.
_SLACK = 16 * 2**20


def forget_peak(device: torch.device | None = None) -> bool:
    """Count peaks from here on: from what the process occupies now, whoever in it holds that.

    Args:
        device: whose allocator forgets too, if it is a GPU.

    Returns:
        Whether the system forgot the host's peak.
    """
    # Before its first use CUDA has no allocator to ask, and no peak either.
    if device is not None and device.type == "cuda" and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats(device)
    try:
        _FORGET.write_text("5")
    except OSError:  # no Linux, or one that does not let us
        return False
    # Some sandboxes take the request and do nothing.
    return peak_resident() <= resident() + _SLACK


def peak_resident() -> int:
    """The most bytes that this process occupied since the last `forget_peak`, or since its beginning."""
    # Rather than getrusage, whose figure begins on Linux with that of the process that this one was forked from.
    found = _status("VmHWM")
    if found is not None:
        return found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident() -> int:
    """The bytes that this process occupies; its peak where the system says no more."""
    found = _status("VmRSS")
    return peak_resident() if found is None else found


def _status(key: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)
