"""Rows of a result file by what may be compared: one backbone, one image size, one protocol."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from bench.tables.protocol import ROWS
from bench.tables.results import Line
from bench.tables.spec import VTAB
from bench.tables.tasks import TASKS

# Columns that result files may have besides `bench.tables.results.FIELDS`.
SAMPLES, SAVED = "train_size", "saved_mb"
# Of train800: what the papers' data scales call a task of VTAB-1k as it is.
_USUAL = 800


@dataclass(frozen=True)
class Study:
    """Runs of one backbone under one protocol.

    Attributes:
        backbone: with its weights, as in the results.
        image_size: in pixels.
        protocol: its name.
        rows: all of them, at every number of training images.
    """

    backbone: str
    image_size: str
    protocol: str
    rows: tuple[Line, ...]

    @property
    def title(self) -> str:
        """For headings."""
        return f"{self.backbone} at {self.image_size} px, {self.protocol}"

    @property
    def slug(self) -> str:
        """For names of files."""
        name = self.backbone.rpartition("/")[2] if "@" not in self.backbone else _short(self.backbone)
        return re.sub(r"[^A-Za-z0-9]+", "-", f"{name}-{self.image_size}-{self.protocol}").strip("-").lower()

    @property
    def main(self) -> list[Line]:
        """Rows at the usual number of training images: a task drawn smaller or larger is no further task."""
        tasks = {row["task"] for row in self.rows}
        rows = [row for row in self.rows if not (_drawn(row["task"]) and base_task(row) in tasks)]
        # Where a column says how many: the number that most final runs have, of equals the larger.
        counts = Counter(row.get(SAMPLES, "") for row in finals(rows))
        if len(counts) < 2:
            return rows
        chosen = max(counts, key=lambda size: (counts[size], float(size or 0)))
        return [row for row in rows if row.get(SAMPLES, "") == chosen]


def _short(backbone: str) -> str:
    name, _, weights = backbone.partition("@")
    return f"{name}-{weights.rpartition('/')[2]}"


def studies(rows: Iterable[Line]) -> list[Study]:
    """Of all rows, in the order of their first."""
    found: dict[tuple[str, str, str], list[Line]] = {}
    for row in rows:
        found.setdefault((row["backbone"], row["image_size"], row["protocol"]), []).append(row)
    return [Study(*key, tuple(own)) for key, own in found.items()]


def base_task(row: Line) -> str:
    """The task that a row's task is a draw of: cifar100 of cifar100-400; else the task itself."""
    found = _drawn(row["task"])
    return found[1] if found else row["task"]


def size_of(row: Line) -> int | None:
    """Training images that the setting was searched with: a column's number, else the end of the task's name, else 800
    for a task of VTAB-1k; None for a task of which nothing says it."""
    if row.get(SAMPLES):
        return int(float(row[SAMPLES]))
    return _size_in(row["task"])


@functools.cache
def _size_in(task: str) -> int | None:
    found = _drawn(task)
    if found:
        return int(found[2])
    return _USUAL if group_of(task) in VTAB else None


@functools.cache
def _drawn(task: str) -> re.Match[str] | None:
    return re.fullmatch(r"(.+)-(\d+)", task)


def diverged(row: Line) -> bool:
    """Whether the run ended because its loss was not finite: its accuracy of zero is no measurement."""
    return not row["trained_parameters"]


def finals(rows: Iterable[Line]) -> list[Line]:
    """Those that were tested."""
    return [row for row in rows if row["stage"] == "final"]


def searched(rows: Iterable[Line]) -> list[Line]:
    """Those that were scored on validation images."""
    return [row for row in rows if row["stage"] == "search"]


def methods_of(rows: Iterable[Line]) -> list[str]:
    """Methods, in the tables' order; others after them by name."""
    order = {name: number for number, name in enumerate(ROWS)}
    return sorted({row["method"] for row in rows}, key=lambda name: (order.get(name, len(order)), name))


def tasks_of(rows: Iterable[Line]) -> list[str]:
    """Tasks, in the papers' order; others after them by name."""
    order = {task.name: number for number, task in enumerate(TASKS)}
    return sorted({row["task"] for row in rows}, key=lambda name: (order.get(name, len(order)), name))


def group_of(task: str) -> str:
    """The papers' group of a task; "other" for one that they lack."""
    return next((known.group for known in TASKS if known.name == task), "other")


def groups_of(tasks: Iterable[str]) -> dict[str, list[str]]:
    """Tasks by group, in the order in which groups appear."""
    found: dict[str, list[str]] = {}
    for task in tasks:
        found.setdefault(group_of(task), []).append(task)
    return found


def accuracies(rows: Iterable[Line], method: str, task: str) -> list[float]:
    """Test accuracies of the seeds, in percent."""
    return [100 * float(row["accuracy"]) for row in finals(rows) if (row["method"], row["task"]) == (method, task)]


def spread(values: Sequence[float]) -> float:
    """Standard deviation of a sample; 0 for one alone."""
    return stdev(values) if len(values) > 1 else 0.0


def number(row: Line, column: str) -> float | None:
    """A column's number, or None where the file has no such column or the run no such number."""
    text = row.get(column, "")
    return float(text) if text else None


def numbers(rows: Iterable[Line], column: str) -> list[float]:
    """A column's numbers, of the rows that have one."""
    return [value for value in (number(row, column) for row in rows) if value is not None]


def seed_means(rows: Sequence[Line], method: str, tasks: Sequence[str]) -> list[float]:
    """A method's mean accuracy over tasks, in percent, one for each seed that all of the tasks have."""
    by_task = [
        {
            row["seed"]: 100 * float(row["accuracy"])
            for row in finals(rows)
            if row["method"] == method and row["task"] == t
        }
        for t in tasks
    ]
    if not by_task or not all(by_task):
        return []
    shared = [seed for seed in by_task[0] if all(seed in own for own in by_task)]
    return [fmean(own[seed] for own in by_task) for seed in shared]
