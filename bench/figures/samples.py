"""Accuracy against the number of training images."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from matplotlib.figure import Figure

from bench.figures.studies import base_task, finals, methods_of, size_of, spread
from bench.figures.style import PANEL, look, panels, styled
from bench.tables.results import Line


@styled
def against_samples(rows: Sequence[Line], methods: Sequence[str] = ()) -> Figure | None:
    """A panel a task that was trained with several numbers of images: mean and deviation over the seeds.

    Args:
        rows: of one study; None comes back where no task has two numbers of images.
        methods: all that share out colours; those of the rows by default.
    """
    rows = [row for row in finals(rows) if size_of(row) is not None]
    found: dict[str, dict[int, list[Line]]] = {}
    for row in rows:
        found.setdefault(base_task(row), {}).setdefault(size_of(row), []).append(row)
    sizes = {task: sorted(found[task]) for task in found if len(found[task]) > 1}
    if not sizes:
        return None
    rows = [row for row in rows if base_task(row) in sizes]
    here = methods_of(rows)
    methods = list(methods) or here
    figure, axes = panels(len(sizes), (PANEL[0], PANEL[1] + 0.2), 0.22 * -(-len(here) // 3))
    lines = {}
    for axis, task in zip(axes, sizes, strict=True):
        for method in here:
            points = []
            for size in sizes[task]:
                own = [row for row in found[task][size] if row["method"] == method]
                values = [100 * float(row["accuracy"]) for row in own]
                if values:
                    points.append((size, fmean(values), spread(values)))
            if points:
                across, means, spreads = zip(*points, strict=True)
                lines[method] = axis.errorbar(across, means, yerr=spreads, capsize=2, **look(method, methods))
        axis.set_xscale("log")
        axis.set_xticks(sizes[task], [f"{size:,.0f}" for size in sizes[task]])
        axis.minorticks_off()
        axis.set_title(task)
        axis.set_xlabel("training images")
        axis.set_ylabel("test accuracy, %")
    shown = [method for method in here if method in lines]
    figure.legend([lines[method] for method in shown], shown, loc="outside lower center", ncols=3)
    return figure
