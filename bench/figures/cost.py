"""What a method costs: time, memory, bytes kept for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from matplotlib.figure import Figure

from bench.figures.studies import SAVED, finals, methods_of, number
from bench.figures.style import PANEL, look, panels, styled
from bench.tables.results import Line

COLUMNS = {
    "ms_per_image": "training, ms an image",
    "peak_memory_mb": "peak memory, MB",
    SAVED: "saved for the backward pass, MB",
}


@styled
def costs(rows: Sequence[Line]) -> Figure | None:
    """A panel a measure, a line a method: the median over the final runs, and their range.

    Args:
        rows: of one study.
    """
    rows = finals(rows)
    methods = methods_of(rows)
    found = {column: {method: own for method in methods if (own := _of(rows, method, column))} for column in COLUMNS}
    found = {column: own for column, own in found.items() if own}
    if not found:
        return None
    figure, axes = panels(len(found), (PANEL[0], 0.75 + 0.24 * len(methods)))
    for axis, (column, own) in zip(axes, found.items(), strict=True):
        for place, method in enumerate(methods):
            values, style = own.get(method, []), look(method, methods)
            if values:
                axis.plot([min(values), max(values)], [place, place], color=style["color"], linewidth=2.2)
                axis.plot(median(values), place, markersize=6.5, clip_on=False, **style)
        everything = [value for values in own.values() for value in values]
        if min(everything) > 0 and max(everything) > 10 * min(everything):
            axis.set_xscale("log")
        else:
            axis.set_xlim(left=0)
        axis.set_yticks(range(len(methods)), methods)
        axis.set_ylim(len(methods) - 0.4, -0.6)
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel(COLUMNS[column])
    return figure


def _of(rows: Sequence[Line], method: str, column: str) -> list[float]:
    return [value for row in rows if row["method"] == method and (value := number(row, column)) is not None]
