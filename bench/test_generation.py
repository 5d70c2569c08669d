"""Generation from an mPLUG decoder as benchmarks: with caches, without, and by Hugging Face's `generate`.

    pytest bench/test_generation.py --benchmark-only [--bench-generation base]

Implementations take turns, as the cost table's do; `bench/generation.py` says what they are.
"""

from __future__ import annotations

import statistics

import pytest

from bench import generation
from bench.cost.session import Replay, Session
from fastpeft.errors import FastPEFTError

_GROUPS: pytest.StashKey[dict] = pytest.StashKey()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test an implementation and number of beams."""
    size = generation.size_of(metafunc.config)
    cells = []
    for beams in generation.BEAMS if size != generation.NONE else ():
        for who in generation.WHO:
            replay = Replay()
            timer = pytest.mark.benchmark(timer=replay.now)
            cells.append(pytest.param(size, beams, who, replay, marks=timer, id=f"{size}-{beams}-{who}"))
    metafunc.parametrize(("size", "beams", "who", "replay"), cells)


def test_generation(benchmark, request, size, beams, who, replay):
    """Time one implementation; about the time nothing is asserted."""
    config = request.config
    groups = config.stash.setdefault(_GROUPS, {})
    if beams not in groups:
        try:
            groups[beams] = generation.measure(size, beams, Session.of(config).settings)
        except FastPEFTError as error:
            pytest.fail(str(error))
    record = next(record for record in groups[beams] if record["who"] == who)
    turns = record["turns"]
    replay.of(turns)
    benchmark.group = f"generation {size}, {beams} beams"
    benchmark.pedantic(replay, rounds=len(turns))
    benchmark.extra_info |= {key: value for key, value in record.items() if key != "turns"}
    benchmark.extra_info |= {"generation": size, "median_ms": 1000 * statistics.median(turns)}
    config.stash.setdefault(generation.RECORDS, []).append(record)
