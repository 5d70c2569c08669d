"""Losses by epoch."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from matplotlib.figure import Figure

from bench.figures.studies import methods_of, tasks_of
from bench.figures.style import PANEL, look, panels, styled
from bench.tables.results import Line


@styled
def by_epoch(curves: Sequence[Line], methods: Sequence[str] = ()) -> Figure | None:
    """A panel a task: the mean over the runs, training's drawn through and the test's dashed.

    Args:
        curves: of one study, as `bench.tables.curves.read` gives them.
        methods: all that share out colours; those of the rows by default.
    """
    tasks, here = tasks_of(curves), methods_of(curves)
    methods = list(methods) or here
    if not tasks:
        return None
    figure, axes = panels(len(tasks), PANEL, 0.22 * -(-len(here) // 3))
    lines = {}
    for axis, task in zip(axes, tasks, strict=True):
        for method in here:
            style = look(method, methods)
            for split, dash in (("train", "-"), ("test", "--")):
                found: dict[int, list[float]] = {}
                for row in curves:
                    if (row["task"], row["method"], row["split"]) == (task, method, split):
                        found.setdefault(int(row["epoch"]), []).append(float(row["loss"]))
                if not found or (split == "test" and len(found) < 2):
                    continue
                epochs = sorted(found)
                (line,) = axis.plot(
                    epochs, [fmean(found[epoch]) for epoch in epochs], linestyle=dash,
                    markevery=max(1, len(epochs) // 6), **style,
                )  # fmt: skip
                lines.setdefault(method, line)
        axis.set_yscale("log")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_title(task)
        axis.set_xlabel("epoch")
        axis.set_ylabel("cross-entropy")
    shown = [method for method in here if method in lines]
    figure.legend([lines[method] for method in shown], shown, loc="outside lower center", ncols=3)
    return figure
