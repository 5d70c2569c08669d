"""The rows of the result file: what takes turns, and what is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from bench.cpu.rows import FLOOR, Settings, in_turns, quiet, release, threads
from bench.memory import in_subprocess, saved_bytes
from bench.mplug_cost.cases import LITERAL, OURS, WHO, Case
from bench.mplug_cost.floor import floor_of
from bench.mplug_cost.steps import agreement, step_of

PARTS = ("steps", "peak")


def rows(
    cases: Iterable[Case], settings: Settings, parts: Iterable[str] = PARTS
) -> Iterator[tuple[str, str, Callable[[], dict[str, object]]]]:
    """Part, key and function of the rows of these cases."""
    cases, parts = list(cases), list(parts)
    if "steps" in parts:
        for case in cases:
            yield "steps", str(case), lambda c=case: timed(c, settings)
    if "peak" in parts:
        for case in cases:
            for who in WHO:
                yield "peak", f"{case}/{who}", lambda c=case, w=who: peak(c, w)


def timed(case: Case, settings: Settings) -> dict[str, object]:
    """F, the literal step and ours in turns, after both were seen to compute the same; and what each keeps.

    Raises:
        BusyError: others computed meanwhile.
        TableError: the two do not compute the same.
    """
    with threads(case):
        try:
            return _timed(case, settings)
        finally:
            release()


def _timed(case: Case, settings: Settings) -> dict[str, object]:
    steps = {who: step_of(case, who) for who in WHO}
    row = case.described() | agreement(steps[LITERAL], steps[OURS], case.dtype)
    row |= {"saved_bytes": {who: saved_bytes(step.forward, step.model) for who, step in steps.items()}}
    if not settings.tiny:
        quiet(settings)  # what is chosen for F is measured too
    floor = floor_of(steps[LITERAL])
    row |= {"floor": {"choices": floor.choices, "operations": floor.operations}}
    return row | in_turns({FLOOR: floor, **steps}, settings)


def peak(case: Case, who: str) -> dict[str, object]:
    """Peak memory of three training steps beyond that of the loaded model and batch, in a process of their own."""
    about = ["--task", case.task, "--images", case.images, "--method", case.method, "--batch", str(case.batch)]
    about += ["--dtype", case.dtype, "--threads", str(case.threads), *(["--tiny"] if case.tiny else [])]
    return {**case.described(), **in_subprocess("bench.mplug_cost.peak", who, *about)}
