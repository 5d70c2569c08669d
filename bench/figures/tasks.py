"""Accuracy of every method on every task, seed by seed."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from matplotlib.figure import Figure

from bench.figures.studies import accuracies, finals, methods_of, spread, tasks_of
from bench.figures.style import INK, PANEL, look, panels, styled
from bench.tables import cells
from bench.tables.results import Line


@styled
def per_task(rows: Sequence[Line], methods: Sequence[str] = ()) -> Figure | None:
    """A panel a task: a small dot a seed, mean and deviation, the paper's number as a hollow circle.

    Args:
        rows: of one study.
        methods: in this order, also where a task lacks one; those of the rows by default.
    """
    rows = finals(rows)
    if not rows:
        return None
    methods = list(methods) or methods_of(rows)
    tasks = tasks_of(rows)
    figure, axes = panels(len(tasks), (PANEL[0], 0.75 + 0.21 * len(methods)))
    for axis, task in zip(axes, tasks, strict=True):
        for place, method in enumerate(methods):
            values = accuracies(rows, method, task)
            style = look(method, methods)
            if values:
                mean, deviation = fmean(values), spread(values)
                axis.plot([mean - deviation, mean + deviation], [place, place], color=style["color"], linewidth=2.2)
                axis.plot(mean, place, color=style["color"], marker=style["marker"], markersize=6.5, clip_on=False)
                axis.plot(values, [place + 0.28] * len(values), ".", color=style["color"], markersize=3.2)
            printed = cells.cell("vpt_table13", method=method, task=task, metric="accuracy")
            if printed is not None and printed.value is not None:
                axis.plot(printed.value, place, "o", color=INK, markerfacecolor="none", markersize=6.5, clip_on=False)
        axis.set_yticks(range(len(methods)), methods)
        axis.set_ylim(len(methods) - 0.4, -0.6)
        axis.tick_params(axis="y", length=0)
        axis.margins(x=0.08)
        axis.set_title(task)
        axis.set_xlabel("test accuracy, %")
    return figure
