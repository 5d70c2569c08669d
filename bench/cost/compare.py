"""Two runs of the cost table side by side, in ratios to the base implementation of the same turns, never in seconds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cost.methods import OURS
from bench.tables.errors import TableError

Record = Mapping[str, Any]
Key = tuple[str, str, str, str]
# What is compared, by what it is called in a record.
RATIOS = {"ratio": "time", "saved_ratio": "saved bytes", "peak_ratio": "peak memory"}
ALLOWED = 0.10


@dataclass(frozen=True)
class Change:
    """A ratio then and now.

    Attributes:
        key: row, phase, implementation, mode.
        figure: key of `RATIOS`.
        before, after: the ratios.
    """

    key: Key
    figure: str
    before: float
    after: float

    @property
    def growth(self) -> float:
        """By how much it grew: 0.1 is a tenth more time or memory."""
        return self.after / self.before - 1

    def regressed(self, allowed: float = ALLOWED) -> bool:
        """Whether it is ours, and grew by more than is allowed."""
        return self.key[2] == OURS and self.growth > allowed

    def __str__(self) -> str:
        row, phase, who, mode = self.key
        what = f"{row}, {phase}, {who}, {mode}, {RATIOS[self.figure]}"
        return f"{what}: {self.before:.3f} -> {self.after:.3f} ({self.growth:+.1%})"


@dataclass(frozen=True)
class Comparison:
    """What two runs have in common.

    Attributes:
        changes: of all ratios that both have.
        different: what keeps runs from being compared at all, or "".
        alone: keys that the run before has and the one after has not.
        without: ratios, by key and figure, that the run before has and the one after lacks.
    """

    changes: tuple[Change, ...]
    different: str = ""
    alone: tuple[Key, ...] = ()
    without: tuple[tuple[Key, str], ...] = ()

    def regressions(self, allowed: float = ALLOWED) -> list[Change]:
        """Ours that grew by more than is allowed, the worst first."""
        return sorted((c for c in self.changes if c.regressed(allowed)), key=lambda c: -c.growth)


def key_of(record: Record) -> Key:
    """What a record is about."""
    return record["row"], record["phase"], record["who"], record["mode"]


def load(path: Path) -> list[Record]:
    """The records of a file that `--benchmark-json` wrote.

    Raises:
        TableError: there is no such file, or it is no such one.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TableError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise TableError(f"{path}: not a benchmark's JSON: {error}") from error
    return records_of(document, str(path))


def records_of(document: Any, source: str) -> list[Record]:
    """The records of such a file's content; `source` names it in errors.

    Raises:
        TableError: it is no such content.
    """
    try:
        found = [one["extra_info"] for one in document["benchmarks"]]
    except (TypeError, KeyError):
        raise TableError(f"{source}: not a file that --benchmark-json wrote") from None
    return [record for record in found if "row" in record and "who" in record]


def compare(before: Iterable[Record], after: Iterable[Record]) -> Comparison:
    """Compare two runs."""
    then, now = ({key_of(record): record for record in records} for records in (before, after))
    if not then or not now:
        return Comparison((), "there is nothing to compare")
    for key in then.keys() & now.keys():
        if different := _different(then[key]["settings"], now[key]["settings"]):
            return Comparison((), different)
    changes = [
        Change(key, figure, then[key][figure], record[figure])
        for key, record in now.items()
        if key in then
        for figure in RATIOS
        if then[key].get(figure) and figure in record
    ]
    alone = tuple(key for key in then if key not in now)
    # A peak, for one, whose process was ended for want of memory.
    without = tuple(
        (key, figure)
        for key, record in now.items()
        if key in then
        for figure in RATIOS
        if then[key].get(figure) and figure not in record
    )
    return Comparison(tuple(changes), "", alone, without)


def _different(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    found = [
        f"{name} {before.get(name)} then, {after.get(name)} now"
        for name in dict.fromkeys((*before, *after))
        if before.get(name) != after.get(name)
    ]
    return "; ".join(found)


def lines(comparison: Comparison, allowed: float = ALLOWED) -> list[str]:
    """The comparison as text: every ratio of time, and what grew by more than is allowed."""
    if comparison.different:
        return [f"not comparable: {comparison.different}"]
    found = [f"{'':<58} {'then':>7} {'now':>7} {'change':>8}"]
    for change in comparison.changes:
        row, phase, who, mode = change.key
        mark = "  regressed" if change.regressed(allowed) else ""
        name = f"{row}, {phase}, {who}{'' if mode == 'eager' else ', ' + mode}: {RATIOS[change.figure]}"
        found.append(f"{name:<58} {change.before:7.3f} {change.after:7.3f} {change.growth:+8.1%}{mark}")
    if comparison.alone:
        names = dict.fromkeys(f"{row} {phase}" for row, phase, *_ in comparison.alone)
        found.append(f"not in this run: {', '.join(names)}")
    for (row, phase, who, _), figure in comparison.without:
        found.append(f"not measured in this run: {RATIOS[figure]} of {row}, {phase}, {who}")
    count = len(comparison.regressions(allowed))
    return [*found, f"{count} of our ratios grew by more than {allowed:.0%}."]
