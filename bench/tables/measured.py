"""What the results say of methods and tasks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean, stdev

from bench.tables.errors import TableError
from bench.tables.job import Backbone
from bench.tables.protocol import Protocol
from bench.tables.results import Line


@dataclass
class Measured:
    """A method on a task: one entry a seed.

    Attributes:
        accuracies: of the test images, in percent, in the order of the file.
        trained: parameters.
        backbone: parameters.
        points: the chosen settings.
    """

    accuracies: list[float] = field(default_factory=list)
    trained: int = 0
    backbone: int = 0
    points: list[str] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Of the accuracies."""
        return mean(self.accuracies)

    @property
    def deviation(self) -> float | None:
        """Of the accuracies, of a sample; None for one alone."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else None


def mean(values: Iterable[float]) -> float:
    """The mean of accuracies, the same number for all samples that have the same.

    Accuracies have few digits, so that means often agree; what their binary forms add up to does not.
    """
    return round(fmean(values), 9)


# By method, then by task.
Table = dict[str, dict[str, Measured]]


def collect(rows: list[Line], backbone: Backbone, protocol: Protocol, setting: str = "") -> Table:
    """Final runs of one backbone under one protocol on one training set, by its name; "" for the default split.

    Raises:
        TableError: a method has runs of two settings with one seed on a task.
    """
    found: Table = {}
    seen: dict[tuple, Line] = {}
    for row in rows:
        same = row["backbone"] == str(backbone) and row["image_size"] == str(backbone.image_size)
        if not same or row["protocol"] != protocol.name or row["stage"] != "final" or row["setting"] != setting:
            continue
        if int(row["seed"]) not in protocol.seeds:
            continue
        if not _first(row, seen):
            continue
        measured = found.setdefault(row["method"], {}).setdefault(row["task"], Measured())
        measured.accuracies.append(100 * float(row["accuracy"]))
        measured.points.append(row["point"])
        if row["trained_parameters"]:
            measured.trained, measured.backbone = int(row["trained_parameters"]), int(row["backbone_parameters"])
    return found


def refuse_mixed(rows: Iterable[Line]) -> None:
    """Look for runs of which no mean may be taken, among final runs of one backbone under one protocol.

    Raises:
        TableError: a method has runs of two settings with one seed on a task.
    """
    seen: dict[tuple, Line] = {}
    for row in rows:
        _first(row, seen)


def _first(row: Line, seen: dict[tuple, Line]) -> bool:
    """Whether a run is its seed's first; False for the same once more."""
    first = seen.setdefault((row["task"], row["method"], row["setting"], int(row["seed"])), row)
    if first is row:
        return True
    if (first["point"], first["accuracy"]) != (row["point"], row["accuracy"]):
        one, other = (f"{line['point'] or 'no setting'}: {line['accuracy']}" for line in (first, row))
        raise TableError(
            f"two runs of {row['method']} on {row['task']} have the seed {row['seed']} ({one}; {other}); keep the "
            "rows of one in this file, and give tables that choose differently a folder each"
        )
    return False


def mean_of(tasks: dict[str, Measured], names: list[str]) -> float | None:
    """The mean of some tasks' means; None if the method lacks one of them."""
    if not names or any(name not in tasks for name in names):
        return None
    return mean(tasks[name].mean for name in names)


def wins(tasks: dict[str, Measured], rival: dict[str, Measured], names: list[str]) -> int | None:
    """Tasks whose mean is strictly above the rival's; None if either lacks one."""
    if not names or any(name not in tasks or name not in rival for name in names):
        return None
    return sum(tasks[name].mean > rival[name].mean for name in names)


def total_parameters(method: str, tasks: dict[str, Measured], names: list[str]) -> float | None:
    """Parameters to keep for all tasks, in backbones: what each task trains, and one backbone unless all of it is."""
    if not names or any(name not in tasks or not tasks[name].backbone for name in names):
        return None
    backbone = tasks[names[0]].backbone
    own = sum(tasks[name].trained for name in names) / backbone
    return own if method == "full" else own + 1
