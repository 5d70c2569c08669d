"""Several runs of a method on their own, the best of them, and all of them together."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.figures.style import INK, PANEL, look, panels, styled

# By group of tasks, method and what it is of: a mean in percent, None where there is none.
Means = Mapping[str, Mapping[str, Mapping[str, float | None]]]
# What there is of several runs, with its marker.
SHOWN = {"average": "o", "best": "^", "ensemble": "D"}


@styled
def of_runs(ours: Means, papers: Means) -> Figure | None:
    """A panel a group of tasks, methods below one another, the paper's numbers hollow; None where nothing was measured.

    Args:
        ours: what was measured, by the names of `SHOWN`.
        papers: the printed numbers; those of a method that was not measured are left out.
    """
    methods = list(dict.fromkeys(name for own in ours.values() for name, values in own.items() if _some(values)))
    groups = [group for group, own in ours.items() if any(map(_some, own.values()))]
    if not groups:
        return None
    figure, axes = panels(len(groups), (PANEL[0], 0.8 + 0.3 * len(methods)), 0.24)
    for axis, group in zip(axes, groups, strict=True):
        for place, method in enumerate(methods):
            color = look(method, methods)["color"]
            own = ours[group].get(method, {})
            there = [value for kind in SHOWN if (value := own.get(kind)) is not None]
            if there:
                axis.plot([min(there), max(there)], [place - 0.14] * 2, color=color, linewidth=1.2)
            # The paper's stand below ours.
            for values, height, fill in ((own, place - 0.14, color),
                                         (papers.get(group, {}).get(method, {}), place + 0.2, "none")):  # fmt: skip
                for kind, marker in SHOWN.items():
                    if values.get(kind) is not None:
                        axis.plot(values[kind], height, marker, color=color, markerfacecolor=fill, clip_on=False)
        axis.set_yticks(range(len(methods)), methods)
        axis.set_ylim(len(methods) - 0.4, -0.6)
        axis.tick_params(axis="y", length=0)
        axis.margins(x=0.08)
        axis.set_title(group)
        axis.set_xlabel("test accuracy, %")
    handles = [Line2D([], [], linestyle="none", marker=marker, color=INK, label=kind) for kind, marker in SHOWN.items()]
    if any(_some(papers.get(group, {}).get(name, {})) for group in groups for name in methods):
        hollow = {"linestyle": "none", "marker": "o", "markerfacecolor": "none"}
        handles.append(Line2D([], [], color=INK, label="hollow: the paper's", **hollow))
    figure.legend(handles=handles, loc="outside lower center", ncols=2 if len(groups) == 1 else 4)
    return figure


def _some(values: Mapping[str, float | None]) -> bool:
    return any(values.get(kind) is not None for kind in SHOWN)
