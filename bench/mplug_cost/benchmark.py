"""Steps of mPLUG as benchmarks of pytest: which cases a run asks for, and their turns."""

from __future__ import annotations

import fnmatch
import itertools
import statistics
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from bench.cost.measure import FLOOR, Clock, against
from bench.cost.settings import Settings
from bench.cpu.tables import text
from bench.device_parts.rows import collect, outcome
from bench.memory import saved_bytes
from bench.mplug_cost.cases import DTYPES, IMAGES, LITERAL, METHODS, TASKS, WHO, Case
from bench.mplug_cost.floor import floor_of
from bench.mplug_cost.steps import agreement, step_of
from bench.tables.errors import TableError, unknown
from bench.timing import interleave
from fastpeft.native.memory import pool

_KEY: pytest.StashKey[Runs] = pytest.StashKey()
# What a run that asks for nothing measures: half a minute.
USUAL = "caption/cached/lora"
_BATCH = 8
_HEADING = ("mPLUG-base step", "", "ms", "x F", "x literal", "saved MiB")


def add_options(parser: pytest.Parser) -> None:
    """Options of mPLUG's benchmarks; device, format, batch, turns and seconds are those of the cost table."""
    group = parser.getgroup("bench", "the cost table")
    group.addoption(
        "--bench-mplug",
        metavar="NAMES",
        help=f"steps, as vqa/*/lora; all, none; default {USUAL}, or none where --bench-rows names rows",
    )
    group.addoption("--bench-mplug-tiny", action="store_true", help="mPLUG in little, to try the program out")


def chosen(patterns: str) -> list[tuple[str, str, str]]:
    """Task, images and method of the steps that comma-separated patterns name; "all" and "none" are such too.

    Raises:
        TableError: a pattern that matches none.
    """
    named = {"/".join(names): names for names in itertools.product(TASKS, IMAGES, METHODS)}
    asked = {"all": ["*"], "none": []}.get(patterns, patterns.split(","))
    for pattern in asked:
        if not fnmatch.filter(named, pattern):
            raise unknown("step of mPLUG", pattern, named)
    return [found for name, found in named.items() if any(fnmatch.fnmatchcase(name, one) for one in asked)]


class Runs:
    """One run.

    Attributes:
        cases: that it asks for.
        settings: turns and seconds, of all.
        records: what benchmarks noted so far.
    """

    def __init__(self, cases: list[Case], settings: Settings) -> None:
        self.cases, self.settings = cases, settings
        self.records: list[dict[str, Any]] = []
        self._measured: tuple[Case | None, dict[str, dict[str, Any]]] = (None, {})

    @classmethod
    def of(cls, config: pytest.Config, settings: Settings) -> Runs:
        """That of a run of pytest, made when it is first asked for.

        Raises:
            pytest.UsageError: the command line asks for what cannot be had.
        """
        if _KEY not in config.stash:
            try:
                usual = "none" if config.getoption("bench_rows") else USUAL
                named = chosen(config.getoption("bench_mplug") or usual)
                if settings.dtype not in DTYPES and named:
                    raise TableError(f"mPLUG's steps are compared in {', '.join(DTYPES)}, not in {settings.dtype}")
            except TableError as error:
                raise pytest.UsageError(f"--bench-mplug: {error}") from None
            about = {"batch": config.getoption("bench_batch") or _BATCH, "dtype": settings.dtype}
            about |= {"threads": settings.threads, "device": settings.device}
            about |= {"tiny": config.getoption("bench_mplug_tiny")}
            config.stash[_KEY] = cls([Case(*names, **about) for names in named], settings)
        return config.stash[_KEY]

    @classmethod
    def begun(cls, config: pytest.Config) -> Runs | None:
        """That of a run of pytest, if anything asked for it."""
        return config.stash.get(_KEY, None)

    def figures(self, case: Case, who: str) -> dict[str, Any]:
        """Those of an implementation; a case is measured when its first figure is wanted, and one is kept."""
        if self._measured[0] != case:
            self._measured = (None, {})
            self._measured = (case, measure(case, self.settings))
        return dict(self._measured[1][who])


def measure(case: Case, settings: Settings) -> dict[str, dict[str, Any]]:
    """Figures of F and of both implementations, as of `bench.cost.measure.measure`; or "error" of each."""
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        found = outcome(lambda: _measure(case, settings), trace=True)
    finally:
        torch.set_num_threads(before)
        collect()
        pool.clear()
    return dict.fromkeys((FLOOR, *WHO), found) if {"error", "unavailable"} & found.keys() else found


def _measure(case: Case, settings: Settings) -> dict[str, dict[str, Any]]:
    steps = {who: step_of(case, who) for who in WHO}
    agreement(*steps.values(), case.dtype)
    found: dict[str, dict[str, Any]] = {FLOOR: {}}
    found |= {who: {"saved_bytes": saved_bytes(step.forward, step.model)} for who, step in steps.items()}
    clocks = {FLOOR: Clock(floor_of(steps[LITERAL]), settings.device)}
    clocks |= {who: Clock(step, settings.device) for who, step in steps.items()}
    interleave(clocks, device=settings.device, turns=settings.turns, warmup=1, budget=settings.seconds)
    for name, clock in clocks.items():
        found[name]["turns"] = clock.seconds[1:]
    for who in WHO:
        found[who] |= against(found[who], found[LITERAL])
        found[who]["floor_ratio"] = statistics.median(found[who]["turns"]) / statistics.median(found[FLOOR]["turns"])
    return found


def render(records: list[Mapping[str, Any]]) -> str:
    """A table of what benchmarks noted."""
    lines, last = [], None
    for record in records:
        name, last = ("" if record["case"] == last else record["case"]), record["case"]
        figures = [
            f"{record['median_ms']:.0f}" if "median_ms" in record else "-",
            f"{record['floor_ratio']:.2f}" if "floor_ratio" in record else "",
            f"{record['ratio']:.2f}" if "ratio" in record else "",
            f"{record['saved_bytes'] / 2**20:.1f}" if "saved_bytes" in record else "",
        ]
        lines.append((name, record["implementation"], *figures))
    return text(_HEADING, lines)
