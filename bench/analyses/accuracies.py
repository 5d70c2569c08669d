"""The accuracies in a result file, of one backbone under one protocol on one kind of training set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.analyses.errors import AnalysisError
from bench.tables.errors import unknown
from bench.tables.results import KEY, Line, Results

# Rows that differ in one of these are never compared.
_SETUP = ("backbone", "image_size", "protocol", "setting")


@dataclass(frozen=True)
class Accuracies:
    """Final runs.

    Attributes:
        path: the file that they are from.
        setup: what they have in common, in words; the training set where it is not the tasks' own.
        by_method: method -> task -> seed -> accuracy of the test images in percent.
    """

    path: Path
    setup: str
    by_method: dict[str, dict[str, dict[int, float]]]

    def of(self, method: str) -> dict[str, dict[int, float]]:
        """Task -> seed -> accuracy of a method.

        Raises:
            TableError: the file has none.
        """
        if method not in self.by_method:
            raise unknown(f"method in {self.path}", method, self.by_method)
        return self.by_method[method]


def read(path: Path, where: Iterable[str] = ()) -> Accuracies:
    """Read the final runs of a result file.

    Args:
        path: a `results.csv` of `bench.tables`.
        where: `FIELD=VALUE`, which rows to look at.

    Raises:
        TableError: the file is not one of these.
        AnalysisError: it is not there, has no such rows, or has rows of several set-ups.
    """
    if not path.is_file():
        raise AnalysisError(f"{path}: no such result file")
    rows = [row for row in Results(path).rows() if row["stage"] == "final"]
    for condition in where:
        field, equals, value = condition.partition("=")
        if not equals or field not in KEY:
            raise AnalysisError(f"--where {condition}: expected FIELD=VALUE with a field of {', '.join(KEY)}")
        rows = [row for row in rows if row[field] == value]
    if not rows:
        raise AnalysisError(f"{path}: no final runs" + (f" with {', '.join(where)}" if where else ""))
    setups = sorted({tuple(row[field] for field in _SETUP) for row in rows})
    if len(setups) > 1:
        found = "; ".join(_conditions(setup) for setup in setups)
        raise AnalysisError(f"{path}: runs of several set-ups; choose one with --where: {found}")
    backbone, size, protocol, images = setups[0]
    setup = f"{backbone} at {size} px, protocol {protocol}" + (f", {images}" if images else "")
    return Accuracies(path, setup, _sorted(path, rows))


def _sorted(path: Path, rows: list[Line]) -> dict[str, dict[str, dict[int, float]]]:
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        seeds = found.setdefault(row["method"], {}).setdefault(row["task"], {})
        seed = int(row["seed"])
        if seed in seeds:
            raise AnalysisError(
                f"{path}: {row['method']} on {row['task']} has two runs with the seed {seed}; choose one with --where "
                "point=..."
            )
        seeds[seed] = 100 * float(row["accuracy"])
    return found


def _conditions(setup: tuple[str, ...]) -> str:
    return " ".join(f"{field}={value}" for field, value in zip(_SETUP, setup, strict=True))
