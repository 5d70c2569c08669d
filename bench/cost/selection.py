"""What has a row in the cost table, and which of it a run asks for."""

from __future__ import annotations

import csv
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from bench.cases import METHODS
from bench.tables.cells import FOLDER, Cell, cell
from bench.tables.errors import unknown
from fastpeft.ops.choose import OPERATORS

PAPER = "vpt_table12"
# What the paper's table does not have: what peft and later papers are compared by.
BESIDES = ("lora-qkv-8", "serial-64", "parallel-64")


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: of a method in `bench.cases.METHODS`, or of an operator.
        method: as in the papers' cells; "" for an operator.
        setting: likewise.
    """

    name: str
    method: str = ""
    setting: str = ""

    @property
    def operator(self) -> bool:
        """Whether it is about an operator alone."""
        return self.name in OPERATORS

    @property
    def missing(self) -> bool:
        """Whether the library has no such method."""
        return not self.operator and self.name not in METHODS

    def paper(self, metric: str) -> Cell | None:
        """The paper's cell, or None."""
        if not self.method:
            return None
        return cell(PAPER, method=self.method, setting=self.setting, metric=metric)


def table() -> tuple[Row, ...]:
    """All rows: the paper's in its order, what is besides, the operators."""
    with (FOLDER / f"{PAPER}.csv").open(encoding="utf-8", newline="") as lines:
        printed = dict.fromkeys((row["method"], row["setting"]) for row in csv.DictReader(lines))
    methods = [Row(f"{method}-{setting.partition('=')[2]}".rstrip("-"), method, setting) for method, setting in printed]
    return (*methods, *map(Row, BESIDES), *map(Row, OPERATORS))


def choose(patterns: Sequence[str] | None) -> tuple[Row, ...]:
    """The rows whose names match one of the patterns, as of a shell; all if None.

    Raises:
        TableError: a pattern matches none; the nearest name is in it.
    """
    everything = table()
    if patterns is None:
        return everything
    for pattern in patterns:
        if not fnmatch.filter([row.name for row in everything], pattern):
            raise unknown("row of the cost table", pattern, [row.name for row in everything])
    return tuple(row for row in everything if any(fnmatch.fnmatchcase(row.name, pattern) for pattern in patterns))
