"""Accuracy of the table's methods, from result files of `python -m bench.tables`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from bench.cost.selection import Row
from bench.record import RESULTS
from bench.tables.errors import TableError
from bench.tables.results import Line, Results

# How results of one kind are told from others.
_KIND = ("backbone", "image_size", "protocol")
# Methods that results name otherwise than the table does, which names sizes too.
_ALSO = {
    "lora-qkv-8": ("lora", "lora-8"),
    "serial-64": ("serial", "serial-adapter", "serial_adapter"),
    "parallel-64": ("parallel", "parallel-adapter", "parallel_adapter"),
}


@dataclass(frozen=True)
class Accuracies:
    """Means over tasks, each the mean of its seeds.

    Attributes:
        percent: by the results' own names of methods.
        about: of what, in a sentence; "" for none.
    """

    percent: Mapping[str, float] = field(default_factory=dict)
    about: str = ""

    def of(self, row: Row) -> float | None:
        """That of a row: of its name, size and all, else of its method whatever the size."""
        names = (row.name, *_ALSO.get(row.name, ()), row.method)
        return next((self.percent[name] for name in names if name in self.percent), None)


def read(path: Path | None) -> Accuracies:
    """Accuracies of a result file, or of the committed one if None.

    Of results of several backbones or protocols the kind with the most runs counts, and only tasks that all of its
    methods have: means over different tasks are not comparable. Runs on training sets of other sizes are left out.

    Raises:
        TableError: there is no such file, or it holds no final run.
    """
    if path is None:
        committed = sorted(RESULTS.glob("*/results.csv"))
        found = [accuracies for file in committed if (accuracies := _read(file)).percent]
        return max(found, key=lambda one: len(one.percent), default=Accuracies())
    if not path.is_file():
        raise TableError(f"--results: there is no file {path}")
    found = _read(path)
    if not found.percent:
        raise TableError(f"--results: {path} holds no final run with tasks that all of its methods have")
    return found


def _read(path: Path) -> Accuracies:
    # A setting is a training set that is not the task's own.
    rows = [row for row in Results(path).rows() if row["stage"] == "final" and not row["setting"]]
    if not rows:
        return Accuracies()
    kinds = Counter(tuple(row[name] for name in _KIND) for row in rows)
    kind = max(kinds, key=lambda one: (kinds[one], one))
    percent, tasks = _means([row for row in rows if tuple(row[name] for name in _KIND) == kind])
    others = f"; {len(kinds) - 1} other kinds of results in the file" if len(kinds) > 1 else ""
    backbone, size, protocol = kind
    about = (
        f"Accuracy: mean over {', '.join(tasks)} of {backbone} at {size} px, protocol {protocol}{others} "
        f"({path.parent.name}/{path.name}); a method's chosen size may be another than the row's."
    )
    return Accuracies(percent, about if percent else "")


def _means(rows: Sequence[Line]) -> tuple[dict[str, float], list[str]]:
    """Percent by method, and the tasks that all methods have."""
    runs: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        runs.setdefault(row["method"], {}).setdefault(row["task"], []).append(100 * float(row["accuracy"]))
    common = sorted(set.intersection(*(set(tasks) for tasks in runs.values())))
    if not common:
        return {}, []
    return {method: fmean(fmean(tasks[task]) for task in common) for method, tasks in runs.items()}, common
