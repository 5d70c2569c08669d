"""Whether the better of two methods depends on how far a task is from what the model was trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from bench.analyses.accuracies import Accuracies
from bench.analyses.errors import AnalysisError
from bench.tables.tasks import TASKS

# Up to so many pairings of n points are counted; of more, so many are drawn.
_PAIRINGS = 9999
_LEAST = 3
# Of a name beside its point, in points of type, the best first.
_PLACES = (
    (6, 0, "left"), (-6, 0, "right"), (0, 9, "center"), (0, -9, "center"), (6, 7, "left"), (6, -7, "left"),
    (-6, 7, "right"), (-6, -7, "right"),
)  # fmt: skip
_COLOURS = {"natural": "tab:green", "specialized": "tab:orange", "structured": "tab:blue"}


@dataclass(frozen=True)
class Gap:
    """A task: where it is, and how two methods do there.

    Attributes:
        task: its name.
        distance: from the reference set.
        difference: of the second method's mean accuracy from the first's, in points.
    """

    task: str
    distance: float
    difference: float


@dataclass(frozen=True)
class Correlation:
    """Of the distances with the differences.

    Attributes:
        spearman: of the ranks.
        p: two-sided, by permutation of the pairs: exact for up to seven tasks.
        pearson: of the values.
        count: tasks.
    """

    spearman: float
    p: float
    pearson: float
    count: int

    def __str__(self) -> str:
        if math.isnan(self.spearman):
            return f"no correlation: all values are equal, {self.count} tasks"
        return f"Spearman {self.spearman:+.2f} (p = {self.p:.2g}), Pearson {self.pearson:+.2f}, {self.count} tasks"


def task_of(name: str) -> str:
    """The papers' name of a task, by any of its usual folder names; another name is its own."""
    return next((task.name for task in TASKS if name in task.folders), name)


def gaps(distances: Mapping[str, float], accuracies: Accuracies, first: str, second: str) -> list[Gap]:
    """The tasks that have a distance and both methods' accuracies, on seeds that both have run.

    Args:
        distances: by name of the data.
        accuracies: of the methods.
        first: method that is subtracted.
        second: method that it is subtracted from.

    Raises:
        AnalysisError: fewer than three such tasks.
    """
    ours, theirs = accuracies.of(second), accuracies.of(first)
    found = []
    for name, distance in distances.items():
        task = task_of(name)
        seeds = ours.get(task, {}).keys() & theirs.get(task, {}).keys()
        if seeds:
            difference = fmean(ours[task][seed] - theirs[task][seed] for seed in seeds)
            found.append(Gap(task, distance, difference))
    if len(found) < _LEAST:
        have = ", ".join(sorted(ours.keys() & theirs.keys())) or "none"
        raise AnalysisError(
            f"{accuracies.path}: {len(found)} of the data sets are tasks with runs of {first} and {second}, expected "
            f"at least {_LEAST}; tasks with both: {have}; name a set as its task with TASK=WHERE"
        )
    return found


def correlation(found: Sequence[Gap]) -> Correlation:
    """Of the distances with the differences."""
    import numpy as np
    from scipy import stats

    x, y = [gap.distance for gap in found], [gap.difference for gap in found]
    if len(set(x)) == 1 or len(set(y)) == 1:
        return Correlation(math.nan, math.nan, math.nan, len(found))
    ranks = stats.zscore(stats.rankdata(y)) / len(y)

    def spearman(other, axis: int = -1):
        return (stats.zscore(other, axis=axis) * ranks).sum(axis=axis)

    test = stats.permutation_test(
        (stats.rankdata(x),),
        spearman,
        permutation_type="pairings",
        vectorized=True,
        n_resamples=_PAIRINGS,
        rng=np.random.default_rng(0),
    )
    return Correlation(float(test.statistic), float(test.pvalue), float(stats.pearsonr(x, y).statistic), len(found))


def figure(found: Sequence[Gap], reference: str, first: str, second: str) -> Figure:
    """Differences over distances, a point a task."""
    drawn = Figure(figsize=(7.6, 5.2), layout="constrained")
    axes = drawn.add_subplot()
    axes.axhline(0, color="0.6", linewidth=0.8)
    groups = {task.name: task.group for task in TASKS}
    for group in dict.fromkeys(groups.get(gap.task, "other") for gap in found):
        own = [gap for gap in found if groups.get(gap.task, "other") == group]
        axes.scatter(
            [gap.distance for gap in own],
            [gap.difference for gap in own],
            color=_COLOURS.get(group, "0.3"),
            label=group,
        )
    axes.margins(x=0.12, y=0.12)
    axes.set_xlabel(f"Fréchet distance to {reference}")
    axes.set_ylabel(f"accuracy, {second} - {first} (points)")
    axes.set_title(str(correlation(found)), fontsize="medium")
    axes.legend(frameon=False, fontsize="small")
    _name(axes, found)
    return drawn


def _name(axes: Axes, found: Sequence[Gap]) -> None:
    """Write the tasks' names beside their points, each where it covers no point and no other name, if there is room."""
    # Places are known when the figure has been laid out.
    canvas = FigureCanvasAgg(axes.figure)
    canvas.draw()
    radius = 4 * axes.figure.dpi / 72
    centres = axes.transData.transform([(gap.distance, gap.difference) for gap in found])
    taken = [Bbox.from_extents(x - radius, y - radius, x + radius, y + radius) for x, y in centres]
    for gap in found:
        names = []
        for x, y, side in _PLACES:
            name = axes.annotate(
                gap.task, (gap.distance, gap.difference), xytext=(x, y), textcoords="offset points", ha=side,
                va="center", fontsize="x-small",
            )  # fmt: skip
            names.append((name, name.get_window_extent(canvas.get_renderer())))
        free = next((one for one in names if not any(one[1].overlaps(other) for other in taken)), names[0])
        taken.append(free[1])
        for name, _ in names:
            if name is not free[0]:
                name.remove()
