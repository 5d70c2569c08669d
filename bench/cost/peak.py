"""Peak memory on the CPU: of two steps beyond the loaded model and batch, in a process of their own.

Such a process is forked from one that has only imported what is needed, which takes longer than the steps do.
"""

from __future__ import annotations

import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from bench.cost.measure import steps_of
from bench.cost.methods import INFERENCE, TRAIN
from bench.cost.selection import Row
from bench.cost.settings import Settings
from bench.memory import ResidentPeak, own_pages
from fastpeft.native.memory import pool

_STEPS = 2


def peaks(row: Row, settings: Settings, who: str) -> dict[str, Any]:
    """Bytes by phase.

    Args:
        row: of the table.
        settings: of the run.
        who: the implementation.

    Raises:
        RuntimeError: the process died, for one because memory was short.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.cost.preload"])
    with ProcessPoolExecutor(1, mp_context=context) as worker:
        try:
            return worker.submit(measured, row, settings, who).result()
        except BrokenProcessPool:
            raise RuntimeError(f"the process that measured the memory of {row.name} by {who} died") from None


def measured(row: Row, settings: Settings, who: str) -> dict[str, int]:
    """Bytes by phase, of this process."""
    torch.set_num_threads(settings.threads)
    own_pages()
    steps = steps_of(row, settings)
    found = {}
    # The smaller first: what it leaves behind does not hide a part of the other's need.
    for phase in (INFERENCE, TRAIN):
        step = steps.prepare(phase, who, compiled=False)
        with ResidentPeak() as peak:
            for _ in range(_STEPS):
                step()
        found[phase] = peak.bytes
        del step
        gc.collect()
        pool.clear()
    return found
