"""Rows of a result file by what may be compared: one backbone, one image size, one protocol."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from bench.tables.measured import refuse_mixed
from bench.tables.protocol import ROWS
from bench.tables.results import Line
from bench.tables.spec import VTAB
from bench.tables.tasks import TASKS

# Columns that result files may have besides `bench.tables.results.FIELDS`.
SAMPLES, SAVED = "train_size", "saved_mb"
# Images of a task of VTAB-1k as it is: those of the search, by which the papers' tables of data scales call it, and
# those of the final runs.
_SEARCHED, _TRAINED = 800, 1000


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
        return slug(f"{name}-{self.image_size}-{self.protocol}")

    @functools.cached_property
    def settings(self) -> list[str]:
        """Training sets by name, as the column has them: the main one, then the others as they come."""
        counts = Counter(row["setting"] for row in self.rows)
        # The tasks as they are, if there is a run on them; of equals the first.
        main = "" if "" in counts else max(counts, key=counts.__getitem__, default="")
        return [main, *(name for name in counts if name != main)]

    @functools.cached_property
    def main(self) -> list[Line]:
        """Rows of the main training set."""
        return self.of(self.settings[0])

    def of(self, setting: str) -> list[Line]:
        """Rows of a training set: a task that is drawn smaller or larger from another one is no further task."""
        tasks = {row["task"] for row in self.rows}
        rows = [row for row in self.rows if row["setting"] == setting]
        return [row for row in rows if not (_drawn(row["task"]) and base_task(row) in tasks)]


def slug(text: str) -> str:
    """What a file may be called."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()


def _short(backbone: str) -> str:
    name, _, weights = backbone.partition("@")
    return f"{name}-{weights.rpartition('/')[2]}"


def studies(rows: Iterable[Line]) -> list[Study]:
    """Of all rows, in the order of their first.

    Raises:
        TableError: a method has final runs of two settings with one seed on a task.
    """
    found: dict[tuple[str, str, str], list[Line]] = {}
    for row in rows:
        found.setdefault((row["backbone"], row["image_size"], row["protocol"]), []).append(row)
    for own in found.values():
        refuse_mixed(finals(own))
    return [Study(*key, tuple(own)) for key, own in found.items()]


def base_task(row: Line) -> str:
    """The task that a row's task is a draw of: cifar100 of cifar100-400; else the task itself."""
    found = _drawn(row["task"])
    return found[1] if found else row["task"]


def by_draws(rows: Iterable[Line]) -> set[str]:
    """Tasks of which others are draws: where a name says how many images, it counts those of the final runs."""
    return {base_task(row) for row in rows if _drawn(row["task"])}


def sizes_of(rows: Sequence[Line]) -> dict[tuple[str, str], int]:
    """Training images by task and training set, of those of which something says it.

    They are counted as the tables count them: those of the search, without the validation images that the final runs
    train on too; of a task with draws, and of its draws, those of the final runs.

    Args:
        rows: of one study, of all stages.
    """
    drawn, found = by_draws(rows), {}
    for row in rows:
        own = row["task"], row["setting"]
        stage = "final" if base_task(row) in drawn else "search"
        named = _size_in(*own)
        if named is not None:
            found[own] = named
        elif row["stage"] == stage and row[SAMPLES]:
            found.setdefault(own, int(row[SAMPLES]))
    for row in rows:
        if row["setting"] == "" and group_of(row["task"]) in VTAB:
            found.setdefault((row["task"], ""), _TRAINED if row["task"] in drawn else _SEARCHED)
    return found


@functools.cache
def _size_in(task: str, setting: str) -> int | None:
    found = _drawn(task) if setting == "" else re.fullmatch(r"(n_train)=(\d+)", setting)
    return int(found[2]) if found else None


@functools.cache
def _drawn(task: str) -> re.Match[str] | None:
    # A number may belong to a name: only the papers' tasks are known to have none.
    found = re.fullmatch(r"(.+)-(\d+)", task)
    return found if found and any(found[1] == known.name for known in TASKS) else None


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
