"""Which method is better than which, by the papers' tests."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from bench.figures.studies import accuracies, finals, methods_of, tasks_of
from bench.figures.style import RULE, panels, styled
from bench.tables import statistics
from bench.tables.results import Line

# Accuracies of the seeds by task.
Table = dict[str, list[float]]
LEVEL = 0.05
# Of numbers on dark and on light cells.
_LIGHT, _DARK = "#f7f7f7", "#101010"


@styled
def matrix(rows: Sequence[Line]) -> Figure | None:
    """Method against method: Wilcoxon's p over the tasks, and on how many tasks Welch's p is below 0.05.

    Args:
        rows: of one study; the test is that the row's method is better than the column's.
    """
    rows = finals(rows)
    methods, tasks = methods_of(rows), tasks_of(rows)
    if len(methods) < 2:
        return None
    found = {
        method: {task: values for task in tasks if (values := accuracies(rows, method, task))} for method in methods
    }
    side = 1.5 + 0.46 * len(methods)
    figure, axes = panels(2, (side, side - 0.3))
    for axis in axes:
        _frame(axis, methods)
    axes[0].set_title("Wilcoxon over tasks: p")
    axes[1].set_title(f"tasks with Welch's p < {LEVEL:g}")
    colours = colormaps["cividis"]
    for down, ours in enumerate(methods):
        for across, rival in enumerate(methods):
            if ours == rival:
                continue
            test = statistics.wilcoxon(found[ours], found[rival])
            if test is None:
                _cell(axes[0], across, down, "-", None)
            else:
                # From 0.5 on nothing speaks for the row.
                share = max(0.0, 1 - test.p / 0.5)
                _cell(axes[0], across, down, _p(test.p), colours(share), share, test.p < LEVEL)
            tests = _welch(found[ours], found[rival])
            if not tests:
                _cell(axes[1], across, down, "-", None)
            else:
                count = sum(test.p < LEVEL for test in tests)
                share = count / len(tests)
                _cell(axes[1], across, down, f"{count}/{len(tests)}", colours(share), share, count > 0)
    return figure


def _welch(ours: Table, rival: Table) -> list[statistics.Test]:
    """Of the tasks that both have with two seeds or more."""
    tests = [statistics.welch(values, rival.get(task, [])) for task, values in ours.items()]
    return [test for test in tests if test is not None]


def _frame(axis: Axes, methods: Sequence[str]) -> None:
    axis.grid(False)
    axis.set_xlim(-0.5, len(methods) - 0.5)
    axis.set_ylim(len(methods) - 0.5, -0.5)
    axis.set_xticks(range(len(methods)), methods, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(methods)), methods)
    axis.tick_params(length=0)
    axis.set_xlabel("... than this")
    axis.set_ylabel("this is better ...")
    for spine in axis.spines.values():
        spine.set_visible(False)


def _cell(axis: Axes, across: int, down: int, text: str, colour, share: float = 0.0, bold: bool = False) -> None:
    if colour is None:
        axis.text(across, down, text, ha="center", va="center", fontsize=7)
        return
    axis.add_patch(Rectangle((across - 0.5, down - 0.5), 1, 1, facecolor=colour, edgecolor=RULE, linewidth=0.5))
    axis.text(across, down, text, ha="center", va="center", fontsize=7, weight="bold" if bold else "normal",
              color=_DARK if share > 0.5 else _LIGHT)  # fmt: skip


def _p(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 else f"{value:.0e}".replace("e-0", "e-")
