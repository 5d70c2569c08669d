"""The rows of `python -m bench.cpu` as benchmarks: ViT-B/16 in bf16 on the CPU, each beside its peer and F.

    pytest bench --benchmark-only

A group is what is compared. Each benchmark notes how many times as fast as the peer ours was when both took turns, the
time of the matrix products F in the same turns, bytes kept for backward, and peak memory in a process of its own. The
batch is small, so that all of it takes minutes; figures to quote are those of `python -m bench.cpu`.
"""

from __future__ import annotations

import os

import pytest
import torch

from bench.cases import token_rows
from bench.cpu.floor import Floor
from bench.cpu.goals import PEERS
from bench.cpu.rows import FLOOR, WARMUP, Clock, ratios, release, saved, summary, threads
from bench.cpu.rows import peak as peak_memory
from bench.cpu.shapes import VIT_B, Models, Shape
from bench.cpu.variants import Variant, step_of
from bench.timing import interleave

_SHAPE = Shape(VIT_B, 4, threads=min(2, os.cpu_count() or 1))
_TURNS, _SECONDS, _ROUNDS = 10, 2.0, 3


@pytest.fixture(scope="module")
def models() -> Models:
    """The model that all benchmarks copy."""
    return Models()


@pytest.fixture(scope="module")
def beside() -> dict[str, dict[str, float]]:
    """Figures of a group, made by its first benchmark."""
    return {}


def _turns(group: str, models: Models) -> dict[str, float]:
    """Medians in milliseconds of ours, the peer and F, and quartiles of their rounds' ratios."""
    ours, peer = PEERS[group]
    plain = models.copy(_SHAPE)
    steps = {name: step_of(Variant.of(name), _SHAPE, models) for name in (ours, peer)}
    clocks = {name: Clock(step) for name, step in steps.items()}
    clocks[FLOOR] = Clock(Floor(plain, token_rows(plain, _SHAPE.images)))
    interleave(clocks, turns=_TURNS, warmup=WARMUP, budget=_SECONDS)
    row = {"variants": {name: summary(clock.seconds[WARMUP:]) for name, clock in clocks.items()}}
    found, low, high = ratios(row, peer, ours)
    return {
        "floor_ms": row["variants"][FLOOR]["median_ms"],
        "times_as_fast": found,
        "times_as_fast_p25": low,
        "times_as_fast_p75": high,
    }


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group, names in PEERS.items() for name in names], ids=lambda text: text
)
def test_step(benchmark, models, beside, group, name):
    """Time one variant; nothing is asserted about the time."""
    if torch.cuda.is_available():
        pytest.skip("bench.device measures on a GPU")
    variant = Variant.of(name)
    with threads(_SHAPE):
        if group not in beside:
            beside[group] = _turns(group, models)
            release()
        step = step_of(variant, _SHAPE, models)
        benchmark.group = f"cpu {group}"
        benchmark.pedantic(step, rounds=_ROUNDS, warmup_rounds=WARMUP)
        benchmark.extra_info |= {**beside[group], "batch": _SHAPE.images, "dtype": _SHAPE.dtype}
        benchmark.extra_info["of_floor"] = benchmark.stats.stats.median * 1000 / beside[group]["floor_ms"]
        if group != "inference":
            benchmark.extra_info["saved_bytes"] = saved(_SHAPE, variant, models)["saved_bytes"]
    del step
    release()
    benchmark.extra_info["peak_bytes"] = peak_memory(_SHAPE, variant)["peak_bytes"]
