"""Numbers of a page from the results: whatever stands between `<!--=WHAT-->` and `<!--/-->` is written anew.

    python -m bench.offline.page docs/offline-study.md bench/results/offline

    table NAME                      a table of `bench.offline.tables`
    mean TASK METHOD                test accuracy in percent, the mean over the seeds
    seeds TASK METHOD               the same of every seed
    gap TASK METHOD OTHER           the first's mean less the other's, in points
    trained TASK METHOD             trained parameters
    runs                            rows of the results
    minutes                         of all runs together
    paper FILE FIELD=VALUE...       a cell of bench/papers

What is not in the results is a dash.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from bench.offline import plan, tables
from bench.tables import cells
from bench.tables.errors import TableError, unknown
from bench.tables.measured import Measured, collect
from bench.tables.results import Line, Results
from fastpeft._serve import serve
from fastpeft.errors import FastPEFTError

_MARK = re.compile(r"<!--=(?P<what>[^>]+?)-->(?P<old>.*?)<!--/-->", re.DOTALL)
_NOTHING = "-"


def fill(text: str, rows: list[Line]) -> str:
    """The page with every marked place written from the results.

    Args:
        text: of the page.
        rows: of the results.

    Raises:
        TableError: a mark asks for something that there is not, or is not closed.
    """
    if len(_MARK.findall(text)) != text.count("<!--="):
        raise TableError("a mark <!--=...--> has no <!--/--> after it")
    found = _Numbers(rows)

    def write(match: re.Match) -> str:
        name, *arguments = match["what"].split()
        if name not in _KINDS:
            raise unknown("mark", name, _KINDS)
        try:
            value = _KINDS[name](found, *arguments)
        except TypeError:
            raise TableError(f"<!--={match['what']}-->: wrong number of words after '{name}'") from None
        return f"<!--={match['what']}-->{value}<!--/-->"

    return _MARK.sub(write, text)


class _Numbers:
    """What marks ask for."""

    def __init__(self, rows: list[Line]) -> None:
        self.rows = rows
        self.layouts = tables.tables(rows)
        self.found = {protocol.name: collect(rows, plan.BACKBONE, protocol) for protocol in (plan.USUAL, plan.ONE_SHOT)}

    def table(self, name: str) -> str:
        if name not in self.layouts:
            raise unknown("table", name, self.layouts)
        # Without its title, which is the page's to give.
        return "\n" + self.layouts[name].markdown().split("\n", 2)[2]

    def measured(self, task: str, method: str) -> Measured | None:
        for kind, name, known in (("task", task, plan.PARTS), ("method", method, plan.ROWS)):
            if name not in known:
                raise unknown(kind, name, known)
        return self.found[plan.PARTS[task].protocol.name].get(method, {}).get(task)

    def mean(self, task: str, method: str) -> str:
        one = self.measured(task, method)
        return _NOTHING if one is None else f"{one.mean:.1f}"

    def seeds(self, task: str, method: str) -> str:
        one = self.measured(task, method)
        return _NOTHING if one is None else ", ".join(f"{accuracy:.1f}" for accuracy in one.accuracies)

    def gap(self, task: str, method: str, other: str) -> str:
        pair = self.measured(task, method), self.measured(task, other)
        return _NOTHING if None in pair else f"{pair[0].mean - pair[1].mean:+.1f}".replace("-", "\N{MINUS SIGN}")

    def trained(self, task: str, method: str) -> str:
        one = self.measured(task, method)
        return _NOTHING if one is None else f"{one.trained:,}"

    def runs(self) -> str:
        return str(len(self.rows))

    def minutes(self) -> str:
        return f"{sum(float(row['seconds'] or 0) for row in self.rows) / 60:,.0f}"

    def paper(self, file: str, *fields: str) -> str:
        cell = cells.cell(file, **dict(field.split("=", 1) for field in fields))
        if cell is None:
            raise TableError(f"bench/papers/{file}.csv has no row with {', '.join(fields)}")
        return str(cell)


_KINDS = {
    "table": _Numbers.table, "mean": _Numbers.mean, "seeds": _Numbers.seeds, "gap": _Numbers.gap,
    "trained": _Numbers.trained, "runs": _Numbers.runs, "minutes": _Numbers.minutes, "paper": _Numbers.paper,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Fill a page; 0, or 2 for one that cannot be filled."""
    arguments = sys.argv[1:] if arguments is None else arguments
    return serve(lambda: _serve(*arguments))


def _serve(*arguments: str) -> int:
    if len(arguments) != 2 or arguments[0].startswith("-"):
        print(__doc__)
        return 0 if arguments in (("-h",), ("--help",)) else 2
    page, folder = map(Path, arguments)
    try:
        page.write_text(
            fill(page.read_text(encoding="utf-8"), Results(folder / "results.csv").rows()), encoding="utf-8"
        )
    except (FastPEFTError, OSError) as error:
        raise TableError(f"{page}: {error}") from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
