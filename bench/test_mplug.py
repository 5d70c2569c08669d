"""Training steps of mPLUG-base as benchmarks: F, the literal implementation and ours take turns.

    pytest bench/test_mplug.py --benchmark-only --bench-mplug "vqa/*,caption/cached/*"

Without the option one step is measured. `python -m bench.mplug_cost` is what results come from.
"""

from __future__ import annotations

import statistics

import pytest

from bench.cost.measure import FLOOR
from bench.cost.session import Replay, Session
from bench.mplug_cost.benchmark import Runs
from bench.mplug_cost.cases import WHO


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test a step and implementation that the run asks for."""
    runs = Runs.of(metafunc.config, Session.of(metafunc.config).settings)
    cells = []
    for case in runs.cases:
        for who in (FLOOR, *WHO):
            replay = Replay()
            timer = pytest.mark.benchmark(timer=replay.now)
            cells.append(pytest.param(runs, case, who, replay, marks=timer, id=f"{case}-{who}"))
    metafunc.parametrize(("runs", "case", "who", "replay"), cells)


def test_step(benchmark, runs, case, who, replay):
    """Hand what was measured in turns to pytest-benchmark; nothing is asserted about the time."""
    figures = runs.figures(case, who)
    record = {"case": str(case), "implementation": who} | case.described()
    for reason in ("error", "unavailable"):
        if reason in figures:
            runs.records.append(record)
            (pytest.fail if reason == "error" else pytest.skip)(figures[reason])
    turns = figures.pop("turns")
    replay.of(turns)
    benchmark.group = str(case)
    benchmark.pedantic(replay, rounds=len(turns))
    record |= {"median_ms": 1000 * statistics.median(turns)} | figures
    benchmark.extra_info |= record
    runs.records.append(record)
