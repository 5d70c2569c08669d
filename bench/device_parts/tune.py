"""Part `tune`: measure the launch choices of the Triton kernels on the shapes of `ops` and `steps`.

What is measured goes into the row and into the file that the library reads by itself (`fastpeft.kernels._choices`), so
that the parts that run afterwards, and every later process on such a chip, use it. What that file holds already is not
measured again.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from unittest import mock

import torch

from bench.cases import TrainingStep
from bench.device_parts import models
from bench.device_parts.operators import Builder, each, function_of, implementations, why_not
from bench.device_parts.rows import Results, Row, Unavailable, grouped
from bench.device_parts.settings import DTYPES, VIT_B, VIT_H, VIT_L, Settings, Shape
from bench.device_parts.steps import GOALS, TABLE_12

_LARGE = ("vpt-deep-200-batch-mask", "lora-qkv-8")


def rows(settings: Settings) -> Iterator[Row]:
    """Operators' problems, then steps, whose shapes are mostly known by then."""
    for operator, case, builder in each("timed", settings.operators, settings.tiny):
        for name in implementations(operator, settings.device):
            if name.partition(":")[0] == "triton":
                key = f"{operator}/{name}/{settings.dtype}/{case}"
                yield key, lambda o=operator, n=name, b=builder: _operator(settings, o, n, b)
    base = settings.shape(VIT_B)
    shapes = [(base, settings.among((*GOALS, *TABLE_12)))]
    if not settings.chosen:
        shapes += [(settings.shape(name), settings.among(_LARGE)) for name in (VIT_H, VIT_L)]
        shapes.append((settings.shape(VIT_B, 4 * settings.batch), settings.among(GOALS)))
    for shape, methods in shapes:
        for method in methods:
            key = f"{shape}/{settings.dtype}/train/{method}"
            yield key, lambda s=shape, m=method: _step(settings, s, m)


def _operator(settings: Settings, operator: str, name: str, builder: Builder) -> dict[str, object]:
    reason = why_not(operator, name, DTYPES[settings.dtype], settings.device)
    if reason is not None:
        raise Unavailable(reason)
    torch.manual_seed(0 if settings.seed is None else settings.seed)
    problem = builder(DTYPES[settings.dtype], settings.device)
    return _tuned(settings, lambda: problem.results(function_of(operator, name, problem)))


def _step(settings: Settings, shape: Shape, method: str) -> dict[str, object]:
    images, labels = settings.batch_of(shape, DTYPES[settings.dtype])
    step = TrainingStep(models.ours(settings, shape, method, "triton"), images, labels)
    return _tuned(settings, step)


def _tuned(settings: Settings, run: Callable[[], object]) -> dict[str, object]:
    """Run under tuning; what was chosen, and where that is kept."""
    from fastpeft.kernels._choices import chip_of, path_of
    from fastpeft.kernels._tune import tuning

    with _apart(settings), tuning(timer=None if settings.cuda else _wall) as found:
        run()
        return {"choices": dict(found), "file": path_of(chip_of(settings.device)).name}


@contextlib.contextmanager
def _apart(settings: Settings) -> Iterator[None]:
    """Keep what the interpreter's times say, which is nothing, from where the library finds it."""
    if settings.cuda:
        yield
        return
    from fastpeft.kernels import _choices, _tune

    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {_choices.VARIABLE: folder}):
        try:
            yield
        finally:
            _tune.forget()


def _wall(runs: Sequence[Callable[[], object]]) -> list[float]:
    seconds = []
    for run in runs:
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return seconds


def table(rows: Mapping[str, Mapping], results: Results) -> str:
    """One line a class of launches: the table's choice, the measured one, and how much faster that is."""
    choices = {key: entry for row in rows.values() for key, entry in row.get("choices", {}).items()}
    lines = [f"{len(choices)} classes of launches; microseconds with the table's choice, and with the fastest"]
    for key, entry in sorted(choices.items()):
        table, best = (entry[name] * 1e6 for name in ("table_seconds", "seconds"))
        found = "the table's" if entry["choice"] == entry["table"] else _words(entry["choice"])
        refused = f", {len(entry['refused'])} refused" if entry.get("refused") else ""
        lines.append(
            f"{key}: {table:.1f} {best:.1f} ({table / best:.2f}x) {_words(entry['table'])} -> {found}{refused}"
        )
    return "\n".join([*lines, *grouped(rows)])


def _words(choice: Mapping[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in choice.items())
