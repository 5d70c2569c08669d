"""Accuracy against the parameters that are trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.figures.studies import finals, groups_of, methods_of, numbers, seed_means, spread, tasks_of
from bench.figures.style import look, panels, styled
from bench.tables.results import Line

_SIZE = (3.5, 3.0)


@styled
def against_parameters(rows: Sequence[Line], methods: Sequence[str] = ()) -> Figure | None:
    """A panel a group of tasks: mean accuracy, with the deviation over the seeds, against the mean of what is trained.

    A method that lacks a task of the group, or whose runs there all diverged, is not in its panel.

    Args:
        rows: of one study.
        methods: all that share out colours; those of the rows by default.
    """
    rows = finals(rows)
    methods = list(methods) or methods_of(rows)
    found: dict[str, list[tuple[str, float, list[float]]]] = {}
    for group, tasks in groups_of(tasks_of(rows)).items():
        for method in methods:
            own = [row for row in rows if row["method"] == method and row["task"] in tasks]
            trained, means = numbers(own, "trained_parameters"), seed_means(rows, method, tasks)
            if trained and means:
                found.setdefault(f"{group}, {_count(tasks)}", []).append((method, fmean(trained), means))
    if not found:
        return None
    figure, axes = panels(len(found), _SIZE)
    for axis, (title, points) in zip(axes, found.items(), strict=True):
        for method, trained, means in points:
            mean = fmean(means)
            style = look(method, methods)
            axis.errorbar(
                trained, mean, yerr=spread(means), fmt="none", ecolor=style["color"], elinewidth=1.2, capsize=2
            )
            axis.plot(trained, mean, linestyle="none", markersize=7, **style)
        axis.set_xscale("log")
        axis.margins(x=0.16, y=0.14)
        _names(axis, [(method, trained, fmean(means)) for method, trained, means in points])
        axis.set_title(title)
        axis.set_xlabel("trained parameters, mean over tasks")
        axis.set_ylabel("test accuracy, %")
    return figure


def _count(tasks: Sequence[str]) -> str:
    return "1 task" if len(tasks) == 1 else f"{len(tasks)} tasks"


def _names(axis: Axes, points: list[tuple[str, float, float]]) -> None:
    """Each point's name beside it, at the first place of a few where it covers no other name and no marker.

    Args:
        axis: its limits are final.
        points: name, abscissa, ordinate.
    """
    # In points of a panel of usual size: what is drawn later is about so large.
    width, height = 72 * (_SIZE[0] - 0.7), 72 * (_SIZE[1] - 0.8)
    left, right = (math.log10(edge) for edge in axis.get_xlim())
    bottom, top = axis.get_ylim()
    at = {
        name: (width * (math.log10(x) - left) / (right - left), height * (y - bottom) / (top - bottom))
        for name, x, y in points
    }
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in at.values()]
    for name, x, y in sorted(points, key=lambda point: at[point[0]]):
        long = 4.6 * len(name)
        options = []
        for along, up, across, down in (
            ("center", "bottom", 0, 8), ("center", "top", 0, -8), ("left", "center", 8, 0), ("right", "center", -8, 0),
            ("center", "bottom", 0, 17), ("center", "top", 0, -17),
        ):  # fmt: skip
            middle = at[name][0] + across, at[name][1] + down
            start = middle[0] - {"center": long / 2, "left": 0, "right": long}[along]
            floor = middle[1] - {"center": 4.5, "bottom": 0, "top": 9}[up]
            box = (start, floor, start + long, floor + 9)
            clear = not any(_meet(box, other) for other in taken) and box[0] > 0 and box[2] < width
            options.append((clear, box, along, up, across, down))
        _, box, along, up, across, down = next((option for option in options if option[0]), options[0])
        taken.append(box)
        axis.annotate(name, (x, y), (across, down), textcoords="offset points", fontsize=7.5, ha=along, va=up)


def _meet(box: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
