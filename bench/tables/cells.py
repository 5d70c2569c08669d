"""The papers' printed numbers."""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "papers"

# What stands behind a number: its reading is uncertain, or it is not what the paper's text has.
UNCERTAIN, AMENDED = "?", "§"
MEANING = {UNCERTAIN: "where its reading is uncertain", AMENDED: "where it is not the one in the paper's text"}
# By note, as bench/papers/README.md has it; "" where no number stands, or the printed one without doubt.
MARKS = {
    "": "",
    "ocr-suspect": UNCERTAIN,
    "corrected": AMENDED,
    "filled": AMENDED,
    "derived": AMENDED,
    "ocr-missing": "",
    "not-reported": "",
    "extra-digit": "",
}


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
        return f"{self.value:.2f}".rstrip("0").rstrip(".") + self.mark

    @property
    def mark(self) -> str:
        """What a table puts behind the number, one of `MARKS`."""
        return MARKS[self.note]

    def said(self, form: str) -> str:
        """The number in a form, marked; only of a cell that has one."""
        return form.format(self.value) + self.mark


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
