"""Is anybody else computing on this machine?

With as many threads as cores, one more runnable process makes every parallel region end on a tick of the scheduler:
steps three times as long, for one implementation and not for another. Then there is nothing to measure.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from bench.device_parts.rows import Unavailable

# Cores that others may use: a twentieth of one.
ALLOWED = 0.05
_STAT = Path("/proc/stat")
_GLANCE = 0.3


class BusyError(Unavailable):
    """Others compute on this machine; one sentence that says how much."""


class Others:
    """CPU time of everybody but this process and its children, since this was made; stolen time is theirs."""

    def __init__(self) -> None:
        self._from = _read()

    def cores(self) -> float | None:
        """Cores used by others on average until now; None where the system does not say."""
        now = _read()
        if now is None or self._from is None:
            return None
        elapsed, busy, own = (b - a for a, b in zip(self._from, now, strict=True))
        return max(0.0, busy - own) / max(elapsed, 1e-9)


def _read() -> tuple[float, float, float] | None:
    """Seconds: on the clock, of all cores at work, of this process and its children."""
    if not _STAT.exists():
        return None
    user, nice, system, _, _, irq, soft, steal = map(int, _STAT.read_text().split(maxsplit=9)[1:9])
    own = os.times()
    busy = (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), busy, sum(own[:4])


def load() -> float | None:
    """Cores that others use right now."""
    others = Others()
    time.sleep(_GLANCE)
    return others.cores()


def wait(seconds: float) -> float | None:
    """Wait until others are idle; what they then use.

    Raises:
        BusyError: they were never, for so many seconds.
    """
    until = time.perf_counter() + seconds
    while (found := load()) is not None and found > ALLOWED:
        if time.perf_counter() > until:
            raise BusyError(f"other processes use {found:.2f} cores of this machine, more than {ALLOWED} is too much")
        time.sleep(1.0)
    return found
