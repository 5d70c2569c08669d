"""Accuracy against the number of training images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from matplotlib.figure import Figure

from bench.figures.studies import base_task, by_draws, finals, methods_of, sizes_of, spread
from bench.figures.style import PANEL, look, panels, styled
from bench.tables.results import Line

# Inches that a panel's axis takes at the least, of a digit at the most, and between two labels.
_AXIS, _DIGIT, _APART = 2.4, 0.075, 0.08


@styled
def against_samples(rows: Sequence[Line], methods: Sequence[str] = ()) -> Figure | None:
    """A panel a task that was trained with several numbers of images: mean and deviation over the seeds.

    Images are counted as the tables count them (`sizes_of`), and each panel says which. Sets of so many images of each
    class are none of a series by size.

    Args:
        rows: of one study, of all stages; None comes back where no task has two numbers of images.
        methods: all that share out colours; those of the rows by default.
    """
    drawn, sizes = by_draws(rows), sizes_of(rows)
    # By task, then by size and what has it: a draw's name and the training set's.
    found: dict[str, dict[tuple[int, str, str], list[Line]]] = {}
    for row in finals(rows):
        own = row["task"], row["setting"]
        if own in sizes and not own[1].endswith("shot"):
            found.setdefault(base_task(row), {}).setdefault((sizes[own], *own), []).append(row)
    series = {task: dict(sorted(own.items())) for task, own in found.items() if len(own) > 1}
    if not series:
        return None
    here = methods_of(row for own in series.values() for rows in own.values() for row in rows)
    methods = list(methods) or here
    figure, axes = panels(len(series), (PANEL[0], PANEL[1] + 0.2), 0.22 * -(-len(here) // 3))
    lines = {}
    for axis, (task, places) in zip(axes, series.items(), strict=True):
        for method in here:
            points = []
            for (size, _, _), own in places.items():
                values = [100 * float(row["accuracy"]) for row in own if row["method"] == method]
                if values:
                    points.append((size, fmean(values), spread(values)))
            if points:
                across, means, spreads = zip(*points, strict=True)
                lines[method] = axis.errorbar(across, means, yerr=spreads, capsize=2, **look(method, methods))
        axis.set_xscale("log")
        ticks = list(dict.fromkeys(size for size, _, _ in places))
        axis.set_xticks(ticks, labels(ticks))
        axis.minorticks_off()
        axis.set_title(task)
        axis.set_xlabel("training images" + (", of final runs" if task in drawn else ", without validation's"))
        axis.set_ylabel("test accuracy, %")
    shown = [method for method in here if method in lines]
    figure.legend([lines[method] for method in shown], shown, loc="outside lower center", ncols=3)
    return figure


def labels(sizes: Sequence[int]) -> list[str]:
    """Numbers below a logarithmic axis, those that would cover the one before a line further down.

    Args:
        sizes: ascending, none of them twice.
    """
    found: list[str] = []
    ends: list[float] = []
    inches = _AXIS / max(math.log(sizes[-1] / sizes[0]), math.log(1.1))
    for size in sizes:
        text = f"{size:,}"
        middle, half = inches * math.log(size / sizes[0]), _DIGIT * len(text) / 2
        line = next((line for line, end in enumerate(ends) if end + _APART <= middle - half), len(ends))
        ends[line : line + 1] = [middle + half]
        found.append("\n" * line + text)
    return found
