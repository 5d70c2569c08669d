"""The rows of the cost table as benchmarks, and the operators.

    pytest bench --benchmark-only

A benchmark is an implementation of a row in one phase; those of a row take turns, and `bench/conftest.py` prints all of
them in one table. docs/benchmarks.md says what can be asked for.
"""

from __future__ import annotations

import statistics

import pytest

from bench.cost.measure import COMPILED, EAGER
from bench.cost.methods import OURS
from bench.cost.session import Replay, Session


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test a row, phase and implementation that the run asks for."""
    mode = metafunc.function.mode
    cells = []
    for row, phase, who in Session.of(metafunc.config).cells(mode):
        replay = Replay()
        timer = pytest.mark.benchmark(timer=replay.now)
        cells.append(pytest.param(row, phase, who, replay, marks=timer, id=f"{row.name}-{phase}-{who}"))
    metafunc.parametrize(("row", "phase", "who", "replay"), cells)


def _noted(benchmark, session: Session, row, phase: str, who: str, mode: str, replay: Replay) -> None:
    """Hand what was measured in turns to pytest-benchmark, and the rest to the table."""
    figures = session.figures(row, phase, who, mode)
    record = {"row": row.name, "phase": phase, "who": who, "mode": mode, "batch": session.settings.batch}
    record |= {"settings": session.settings.described(mode == COMPILED)}
    for reason in ("error", "unavailable"):
        if reason in figures:
            session.records.append(record | {reason: figures[reason]})
            (pytest.fail if reason == "error" else pytest.skip)(figures[reason])
    turns = figures.pop("turns")
    replay.of(turns)
    benchmark.group = f"{row.name} {phase} {mode}"
    benchmark.pedantic(replay, rounds=len(turns))
    record |= {"median_ms": 1000 * statistics.median(turns)} | figures
    if "floor" in record:
        record["floor_ms"] = 1000 * record.pop("floor")
    benchmark.extra_info |= record
    tuned = session.tuned_percent(row) if who == OURS else None
    session.records.append(record | {"tuned_percent": tuned})


def test_eager(benchmark, cost_session, row, phase, who, replay):
    """Time one implementation; nothing is asserted about the time."""
    _noted(benchmark, cost_session, row, phase, who, EAGER, replay)


def test_compiled(benchmark, cost_session, row, phase, who, replay):
    """The same under torch.compile, as long as there is time for the compiler."""
    _noted(benchmark, cost_session, row, phase, who, COMPILED, replay)


test_eager.mode, test_compiled.mode = EAGER, COMPILED
