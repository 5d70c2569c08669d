"""Times of single operators, which on a GPU are shorter than their launches.

The GPU is kept busy while the CPU queues a call, and events around the call are read: what the device needs, without
what the CPU needs. Before each call the cache is overwritten, as it would be inside a training step.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from bench.timing import Step, Timing, interleave

# More than any GPU's last cache, and some two milliseconds for the CPU to queue tens of kernels in.
_FLUSH_BYTES, _BUSY_CYCLES = 256 << 20, 4_000_000


def device_times(
    variants: Mapping[str, Step], device: torch.device, turns: int, budget: float = float("inf")
) -> dict[str, Timing]:
    """Time variants in turns, A B C, B C A, C A B.

    Args:
        variants: what to time, by name.
        device: where; on a CPU these are `interleave`'s times.
        turns: of each variant.
        budget: seconds after which no further round starts; three at least are timed.
    """
    if device.type != "cuda":
        return interleave(variants, device=device, turns=turns, warmup=1, budget=budget)
    for step in variants.values():
        for _ in range(3):
            step()
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    names = list(variants)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in names}
    started = time.perf_counter()
    for turn in range(turns):
        if turn >= 3 and time.perf_counter() - started > budget:
            break
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            torch.cuda._sleep(_BUSY_CYCLES)
            begin.record()
            variants[name]()
            end.record()
            events[name].append((begin, end))
        torch.cuda.synchronize(device)
    return {name: Timing.of([begin.elapsed_time(end) / 1000 for begin, end in pairs]) for name, pairs in events.items()}
