"""A group of the cost table: the implementations of one row in one phase take turns, with the products F beside them.

A group is measured eagerly or under torch.compile. The implementation that ratios are to runs eagerly in both, so that
each figure has its ratio from turns that it took itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bench.cost.methods import TRAIN, MethodSteps
from bench.cost.operators import OperatorSteps
from bench.cost.selection import Row
from bench.cost.settings import Settings
from bench.device_parts.rows import clean, outcome
from bench.memory import cuda_peak, saved_bytes
from bench.timing import Step, interleave
from fastpeft.native.memory import pool

EAGER, COMPILED = "eager", "compiled"
MODES = (EAGER, COMPILED)
FLOOR = "F"
_WARMUP = 1
# What the compiler looks at anew, before a step runs as it will.
_COMPILED_WARMUP = 3
# The second meets the optimizer's state.
_PEAK_STEPS = 2

Figures = dict[str, Any]
Steps = MethodSteps | OperatorSteps


class Clock:
    """A step that notes how long it takes, after one of its own kind.

    In training a step follows on one like it; after the others' turns caches and memory are theirs.
    """

    def __init__(self, step: Step, device: str) -> None:
        self._step, self._cuda = step, torch.device(device).type == "cuda"
        self.seconds: list[float] = []

    def __call__(self) -> None:
        """Take two steps, the second by the clock."""
        self._step()
        self._synchronise()
        begin = time.perf_counter()
        self._step()
        self._synchronise()
        self.seconds.append(time.perf_counter() - begin)

    def _synchronise(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


def steps_of(row: Row, settings: Settings) -> Steps:
    """The steps of a row."""
    return OperatorSteps(row.name, settings) if row.operator else MethodSteps(row.name, settings)


def measure(steps: Steps, phase: str, mode: str) -> dict[str, Figures]:
    """Figures of every implementation, and of F; "error" or "unavailable" for what could not be had.

    Figures are `turns` in seconds, `ratio` to the base's, the median of the rounds' own with their quartiles, and
    what is kept for the backward pass, `saved_bytes`; on a GPU also `peak_bytes` and its ratio.
    """
    settings = steps.settings
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        return _measure(steps, phase, mode)
    finally:
        torch.set_num_threads(before)
        clean()
        pool.clear()


def _measure(steps: Steps, phase: str, mode: str) -> dict[str, Figures]:
    settings, clocks, found = steps.settings, {}, {}
    for who in steps.who:
        found[who] = _prepared(steps, phase, who, mode == COMPILED, clocks, who)
    if mode == COMPILED:
        found["base"] = _prepared(steps, phase, steps.base, False, clocks, "base")
    elif (products := steps.floor(phase)) is not None:
        clocks[FLOOR], found[FLOOR] = Clock(products, settings.device), {}
    interleave(clocks, device=settings.device, turns=settings.turns, warmup=_WARMUP, budget=settings.seconds)
    for name, clock in clocks.items():
        found[name]["turns"] = clock.seconds[_WARMUP:]
    base = found["base" if mode == COMPILED else steps.base]
    for name, figures in found.items():
        if "turns" in figures and "turns" in base and name != FLOOR:
            figures |= against(figures, base)
    if mode == COMPILED:
        del found["base"]
    return found


def _prepared(steps: Steps, phase: str, who: str, compiled: bool, clocks: dict[str, Clock], name: str) -> Figures:
    """Prepare an implementation, add its clock, count what it keeps."""

    def prepare() -> Figures:
        step = steps.prepare(phase, who, compiled)
        for _ in range(_COMPILED_WARMUP if compiled else 1):
            step()
        figures: Figures = {}
        if phase == TRAIN:
            figures["saved_bytes"] = saved_bytes(*steps.kept(step))
        if steps.settings.cuda:
            figures["peak_bytes"] = _cuda_peak(steps, step)
        clocks[name] = Clock(step, steps.settings.device)
        return figures

    return outcome(prepare, trace=True)


def _cuda_peak(steps: Steps, step: Any) -> int:
    steps.resident(step)
    return cuda_peak(lambda: [step() for _ in range(_PEAK_STEPS)], steps.settings.device)


def against(figures: Mapping[str, Any], base: Mapping[str, Any]) -> Figures:
    """Ratios of time and memory to the base's; 1 and more says nothing of the base itself."""
    # What disturbs a round disturbs all that take their turn in it; the ratio of two medians is of different rounds.
    rounds = [own / other for own, other in zip(figures["turns"], base["turns"], strict=True)]
    low, middle, high = statistics.quantiles(rounds, n=4, method="inclusive") if len(rounds) > 1 else rounds * 3
    found: Figures = {"ratio": middle, "ratio_p25": low, "ratio_p75": high}
    return found | memory_ratios(figures, base)


def memory_ratios(figures: Mapping[str, Any], base: Mapping[str, Any]) -> Figures:
    """Ratios of what both have."""
    pairs = {"saved_ratio": "saved_bytes", "peak_ratio": "peak_bytes"}
    return {name: figures[of] / base[of] for name, of in pairs.items() if of in figures and base.get(of)}


class Measurements:
    """Every group that a session asks for, measured once, when its first figure is wanted.

    Args:
        settings: of the run.
        say: called with a line about each group that is done.
        measure: what measures a group; of peaks, what measures those that need a process of their own.
    """

    def __init__(
        self,
        settings: Settings,
        say: Callable[[str], None],
        measure: Callable[[Steps, str, str], dict[str, Figures]] = measure,
        peaks: Callable[[Row, Settings, str], Figures] | None = None,
    ) -> None:
        self.settings = settings
        self._say, self._measure, self._peaks = say, measure, peaks
        self._steps: dict[str, Steps] = {}
        self._groups: dict[tuple[str, str, str], dict[str, Figures]] = {}
        self._peak: dict[tuple[str, str], Figures] = {}

    def steps(self, row: Row) -> Steps:
        """A row's steps."""
        if row.name not in self._steps:
            self._steps[row.name] = steps_of(row, self.settings)
        return self._steps[row.name]

    def has(self, row: Row, phase: str, mode: str) -> bool:
        """Whether a group is measured already."""
        return (row.name, phase, mode) in self._groups

    def figures(self, row: Row, phase: str, who: str, mode: str) -> Figures:
        """Those of an implementation, with the group's F in seconds as `floor`."""
        key = (row.name, phase, mode)
        if key not in self._groups:
            begin = time.perf_counter()
            self._groups[key] = group = self._measure(self.steps(row), phase, mode)
            if mode == EAGER and self._peaks is not None and not self.settings.cuda:
                self._add_peaks(row, phase, group)
            self._say(_line(row, phase, mode, group, time.perf_counter() - begin))
        found = dict(self._groups[key].get(who, {"unavailable": f"{row.name} has no {who}"}))
        floor = self._groups[key].get(FLOOR, {}).get("turns")
        return found | ({} if floor is None else {"floor": statistics.median(floor)})

    def _add_peaks(self, row: Row, phase: str, group: dict[str, Figures]) -> None:
        """Peaks on the CPU; a process that measures one phase measures both."""
        timed = [name for name, figures in group.items() if "turns" in figures and name != FLOOR]
        for name in timed:
            if (row.name, name) not in self._peak:
                self._peak[row.name, name] = outcome(lambda name=name: self._peaks(row, self.settings, name))
            peak = self._peak[row.name, name]
            group[name] |= {"peak_bytes": peak[phase]} if phase in peak else {"peak_" + key: peak[key] for key in peak}
        base = group[self.steps(row).base]
        for name in timed:
            group[name] |= memory_ratios(group[name], base)


def _line(row: Row, phase: str, mode: str, group: Mapping[str, Figures], seconds: float) -> str:
    cells = []
    for name, figures in group.items():
        reason = next((figures[key] for key in ("error", "unavailable") if key in figures), None)
        cells.append(
            f"{name} {1000 * statistics.median(figures['turns']):.4g} ms" if reason is None else f"{name}: {reason}"
        )
    return f"{row.name}, {phase}, {mode}: {', '.join(cells)} ({seconds:.0f} s)"
