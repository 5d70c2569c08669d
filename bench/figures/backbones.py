"""Accuracy by backbone, small to large."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bench.figures.style import INK, PANEL, look, panels, styled

# By group of tasks and method: a mean of each backbone in percent, None where there is none.
Means = Mapping[str, Mapping[str, Sequence[float | None]]]


@styled
def by_backbone(titles: Sequence[str], ours: Means, papers: Means) -> Figure | None:
    """A panel a group of tasks, a line a method, the paper's numbers hollow; None where nothing was measured.

    Args:
        titles: of the backbones, small to large.
        ours: what was measured.
        papers: the printed numbers; those of a method that was not measured are left out.
    """
    methods = list(dict.fromkeys(name for own in ours.values() for name, means in own.items() if _some(means)))
    groups = [group for group, own in ours.items() if any(map(_some, own.values()))]
    if not groups:
        return None
    figure, axes = panels(len(groups), PANEL, 0.22 * -(-(len(methods) + 1) // 3))
    for axis, group in zip(axes, groups, strict=True):
        for method in methods:
            style = look(method, methods)
            for means, fill, stroke in ((ours[group].get(method, ()), style["color"], "-"),
                                        (papers.get(group, {}).get(method, ()), "none", "none")):  # fmt: skip
                there = [(place, mean) for place, mean in enumerate(means) if mean is not None]
                if there:
                    across, up = zip(*there, strict=True)
                    size = 5 if stroke == "-" else 7.5
                    axis.plot(across, up, linestyle=stroke, markerfacecolor=fill, markersize=size, **style)
        axis.set_xticks(range(len(titles)), titles)
        axis.set_xlim(-0.4, len(titles) - 0.6)
        axis.set_title(group)
        axis.set_ylabel("test accuracy, %")
    handles = [Line2D([], [], label=name, **look(name, methods)) for name in methods]
    hollow = {"linestyle": "none", "marker": "o", "markerfacecolor": "none", "markersize": 7.5}
    if any(_some(papers.get(group, {}).get(name, ())) for group in groups for name in methods):
        handles.append(Line2D([], [], color=INK, label="hollow: the paper's number", **hollow))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _some(means: Sequence[float | None]) -> bool:
    return any(mean is not None for mean in means)
