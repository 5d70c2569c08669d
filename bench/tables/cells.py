"""The papers' printed numbers."""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "papers"


@dataclass(frozen=True)
class Cell:
    """One printed value.

    Attributes:
        value: the number, or None where there is none.
        note: why it is not to be taken at face value, or "".
    """

    value: float | None
    note: str

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        return f"{self.value:.2f}".rstrip("0").rstrip(".") + ("?" if self.note == "ocr-suspect" else "")


@functools.cache
def _rows(file: str) -> tuple[dict[str, str], ...]:
    with (FOLDER / f"{file}.csv").open(encoding="utf-8", newline="") as lines:
        return tuple(csv.DictReader(lines))


def cell(file: str, **where: str) -> Cell | None:
    """The value of a file whose row has these fields, or None if there is no such row.

    Args:
        file: name of a file in bench/papers without its ending.
        **where: fields of the row, such as method, task, group, metric, setting.
    """
    for row in _rows(file):
        if all(row[field] == value for field, value in where.items()):
            try:
                value = float(row["value"])
            except ValueError:
                value = None
            return Cell(value, row["note"])
    return None
