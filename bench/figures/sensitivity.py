"""What the search saw: validation accuracy by learning rate, weight decay and the method's own knob."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.figures.studies import diverged, methods_of, searched, tasks_of
from bench.figures.style import look, panels, styled
from bench.tables.results import Line, point_of

# Points that an axis spans at least: differences of less than one are not to look like mountains.
_SPAN = 5.0
RATE, DECAY = "base_lr", "weight_decay"
# Of numbers on dark and on light cells.
_LIGHT, _DARK = "#f7f7f7", "#101010"


@styled
def heatmaps(rows: Sequence[Line]) -> Figure | None:
    """A panel a task: learning rate across, weight decay down, the best over the method's own knob; the best in bold.

    Runs that diverged are marked as such.

    Args:
        rows: of one study and one method.
    """
    rows = searched(rows)
    tasks = tasks_of(rows)
    if not tasks:
        return None
    rates = sorted({point_of(row["point"])[RATE] for row in rows})
    decays = sorted({point_of(row["point"])[DECAY] for row in rows}, reverse=True)
    figure, axes = panels(len(tasks), (max(2.3, 0.9 + 0.42 * len(rates)), 1.0 + 0.3 * len(decays)))
    for axis, task in zip(axes, tasks, strict=True):
        scores = np.full((len(decays), len(rates)), np.nan)
        lost = np.zeros(scores.shape, bool)
        for row in rows:
            if row["task"] != task:
                continue
            point = point_of(row["point"])
            place = decays.index(point[DECAY]), rates.index(point[RATE])
            if diverged(row):
                lost[place] = True
            else:
                scores[place] = np.nanmax([scores[place], 100 * float(row["accuracy"])])
        _grid(axis, scores, lost)
        axis.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axis.set_yticks(range(len(decays)), [f"{decay:g}" for decay in decays])
        axis.set_title(task)
        axis.set_xlabel("base learning rate")
        axis.set_ylabel("weight decay")
    return figure


def _grid(axis: Axes, scores: np.ndarray, lost: np.ndarray) -> None:
    """Cells with their numbers."""
    low, high = (np.nanmin(scores), np.nanmax(scores)) if np.isfinite(scores).any() else (0.0, 1.0)
    colours = colormaps["cividis"]
    axis.grid(False)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)
    down, across = (np.arange(count + 1) - 0.5 for count in scores.shape)
    span = high if high > low else low + 1
    cells = np.ma.masked_invalid(scores)
    axis.pcolormesh(across, down, cells, cmap=colours, vmin=low, vmax=span, edgecolors="face")
    axis.invert_yaxis()
    best = np.argwhere(scores == high) if high > low else np.empty((0, 2), int)
    for (row, column), score in np.ndenumerate(scores):
        if np.isnan(score):
            if lost[row, column]:
                axis.text(column, row, "div.", ha="center", va="center", fontsize=7, in_layout=False)
            continue
        share = (score - low) / (high - low) if high > low else 0.0
        colour = _DARK if share > 0.5 else _LIGHT
        axis.text(column, row, f"{score:.1f}", ha="center", va="center", fontsize=7, color=colour,
                  weight="bold" if [row, column] in best.tolist() else "normal", in_layout=False)  # fmt: skip


@styled
def knobs(rows: Sequence[Line], methods: Sequence[str] = ()) -> Figure | None:
    """A panel a task: the best validation accuracy over learning rate and weight decay at each prompt length (or
    reduction), a line a method.

    Args:
        rows: of one study; None comes back where no method has such a knob with two values.
        methods: all that share out colours; those of the rows by default.
    """
    rows = [row for row in searched(rows) if not diverged(row)]
    methods = list(methods) or methods_of(rows)
    found: dict[tuple[str, str], dict[str, dict[float, float]]] = {}
    for row in rows:
        point = point_of(row["point"])
        for knob in point.keys() - {RATE, DECAY}:
            own = found.setdefault((row["task"], knob), {}).setdefault(row["method"], {})
            own[point[knob]] = max(own.get(point[knob], 0.0), 100 * float(row["accuracy"]))
    several = {place: own for place, own in found.items() if any(len(line) > 1 for line in own.values())}
    order = tasks_of(rows)
    places = sorted(several, key=lambda place: (place[1], order.index(place[0])))
    if not places:
        return None
    figure, axes = panels(len(places))
    for axis, place in zip(axes, places, strict=True):
        task, knob = place
        values = sorted({value for line in several[place].values() for value in line})
        for method in methods:
            line = several[place].get(method, {})
            if line:
                at = sorted(line)
                axis.plot([values.index(value) for value in at], [line[value] for value in at], label=method,
                          **look(method, methods))  # fmt: skip
        axis.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        axis.margins(x=0.08, y=0.15)
        low, high = axis.get_ylim()
        if high - low < _SPAN:
            axis.set_ylim((low + high - _SPAN) / 2, (low + high + _SPAN) / 2)
        axis.legend()
        axis.set_title(task)
        axis.set_xlabel({"length": "prompt length", "reduction": "reduction of the bottleneck"}.get(knob, knob))
        axis.set_ylabel("validation accuracy, %")
    return figure


@styled
def rates(rows: Sequence[Line], methods: Sequence[str] = ()) -> Figure | None:
    """How far each learning rate stays behind a task's best, a panel a method: mean and range over the tasks.

    At each rate the best over all else is taken. A task whose every run diverged at a rate is not in that rate's mean;
    the number of such tasks stands at the rate.

    Args:
        rows: of one study.
        methods: all that share out colours; those of the rows by default.
    """
    rows = searched(rows)
    methods = list(methods) or methods_of(rows)
    found: dict[str, dict[float, dict[str, float | None]]] = {}
    for row in rows:
        own = found.setdefault(row["method"], {}).setdefault(point_of(row["point"])[RATE], {})
        score = None if diverged(row) else 100 * float(row["accuracy"])
        known = own.setdefault(row["task"], score)
        own[row["task"]] = score if known is None else known if score is None else max(known, score)
    several = [method for method in methods if len(found.get(method, ())) > 1]
    if not several:
        return None
    figure, axes = panels(len(several), (3.5, 2.2))
    for axis, method in zip(axes, several, strict=True):
        _behind(axis, found[method], look(method, methods))
        axis.set_title(method)
        axis.set_xlabel("base learning rate")
        axis.set_ylabel("points behind the best")
    return figure


def _behind(axis: Axes, found: dict[float, dict[str, float | None]], style: dict[str, str]) -> None:
    """One method's line, from its scores by rate and task."""
    best: dict[str, float] = {}
    for own in found.values():
        for task, score in own.items():
            if score is not None:
                best[task] = max(best.get(task, score), score)
    at = sorted(found)
    behind = [[best[task] - score for task, score in found[rate].items() if score is not None] for rate in at]
    there = [place for place, gaps in enumerate(behind) if gaps]
    axis.plot(there, [fmean(behind[place]) for place in there], **style)
    low, high = [min(behind[place]) for place in there], [max(behind[place]) for place in there]
    axis.fill_between(there, low, high, color=style["color"], alpha=0.18, linewidth=0)
    axis.set_xticks(range(len(at)), [f"{rate:g}" for rate in at], rotation=45 if len(at) > 10 else 0)
    deepest = max(_SPAN, *high)
    axis.set_ylim(1.06 * deepest, -0.06 * deepest)
    for place, rate in enumerate(at):
        lost = sum(score is None for score in found[rate].values())
        if lost:
            axis.text(place, 0.02, f"{lost} div.", ha="center", va="bottom", fontsize=7,
                      transform=axis.get_xaxis_transform())  # fmt: skip
