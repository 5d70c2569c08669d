"""A study's figures on the page, by section.

A figure with a panel a task is drawn task by task, so that a narrow page can put one below the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.figure import Figure

from bench.figures import catalogue, cost, losses, parameters, samples, sensitivity, significance, tasks
from bench.figures.studies import Study, base_task, groups_of, methods_of, searched, slug, tasks_of
from bench.report import pictures
from bench.tables.results import Line

Draw = Callable[[Sequence[Line]], Figure | None]


@dataclass(frozen=True)
class Panel:
    """Figures that belong together.

    Attributes:
        title: above them; "" if the section's is enough.
        figures: SVG elements.
        folded: whether they open on request.
    """

    title: str
    figures: list[Markup]
    folded: bool = False


def of_study(study: Study, anchor: str, lines: Sequence[Line]) -> dict[str, list[Panel]]:
    """Panels by the name of their section; sections without a figure are not there.

    Args:
        study: of the results.
        anchor: before every identifier.
        lines: of all curves that were kept.
    """
    rows, everything = study.main, methods_of(study.rows)
    show, each = _Shower(anchor), _by("task")

    def plain(draw: Callable) -> Draw:
        return lambda own: draw(own, everything)

    found = {
        "tasks": show.all(tasks_of(rows), lambda own: tasks.per_task(own, methods_of(rows)), each(rows), "tasks"),
        "parameters": show.all(
            groups_of(tasks_of(rows)), plain(parameters.against_parameters), _by_group(rows), "parameters"
        ),
        "samples": show.all(
            dict.fromkeys(map(base_task, study.rows)), plain(samples.against_samples), _by_base(study.rows), "samples"
        ),
        "significance": show.one(significance.matrix(rows), "significance"),
        "cost": show.one(cost.costs(rows), "cost"),
    }
    panels = {name: [Panel("", figures)] for name, figures in found.items() if figures}
    panels["losses"] = [
        Panel("" if setting == study.settings[0] else setting, figures)
        for setting, own in catalogue.curves_of(study, lines).items()
        if (figures := show.all(tasks_of(own), plain(losses.by_epoch), each(own), slug(f"losses {setting}")))
    ]
    panels["search"] = _search(show, rows, plain)
    return {name: own for name, own in panels.items() if own}


def _search(show: _Shower, rows: Sequence[Line], plain: Callable[[Callable], Draw]) -> list[Panel]:
    """How the search went: by learning rate at sight, the rest folded."""
    methods, names, by_task = methods_of(searched(rows)), tasks_of(rows), _by("task")
    panels = [
        Panel("", show.all(methods, plain(sensitivity.rates), _by("method")(rows), "rates")),
        Panel("Prompt length and reduction", show.all(names, plain(sensitivity.knobs), by_task(rows), "knobs"), True),
    ]
    for method in methods:
        own = by_task([row for row in rows if row["method"] == method])
        panels.append(Panel(method, show.all(names, sensitivity.heatmaps, own, f"search-{method}"), True))
    return [panel for panel in panels if panel.figures]


_LABELS = {
    "tasks": "test accuracy by method",
    "parameters": "test accuracy against trained parameters",
    "samples": "test accuracy by training images",
    "losses": "loss by epoch",
    "significance": "p-values, method against method",
    "cost": "time and memory by method",
    "rates": "points behind the best by learning rate",
    "knobs": "validation accuracy by prompt length and reduction",
}


@dataclass(frozen=True)
class _Shower:
    """Makes elements of figures.

    Attributes:
        anchor: before every identifier.
    """

    anchor: str

    def one(self, figure: Figure | None, name: str, part: str = "") -> list[Markup]:
        """The figure as an element; none if there is none."""
        if figure is None:
            return []
        known = _LABELS.get(name.partition("-")[0])
        label = name.replace("-", ": ", 1) if known is None else known
        prefix = "-".join(filter(None, (self.anchor, name, part)))
        return [pictures.inline(figure, prefix, f"{label}: {part}" if part else label)]

    def all(self, parts: Sequence[str], draw: Draw, rows_of: Callable[[str], list[Line]], name: str) -> list[Markup]:
        """A figure of each part's rows, of those that have one."""
        return [element for part in parts for element in self.one(draw(rows_of(part)), name, part)]


def _by(column: str) -> Callable[[Sequence[Line]], Callable[[str], list[Line]]]:
    return lambda rows: lambda value: [row for row in rows if row[column] == value]


def _by_group(rows: Sequence[Line]) -> Callable[[str], list[Line]]:
    groups = groups_of(tasks_of(rows))
    return lambda group: [row for row in rows if row["task"] in groups[group]]


def _by_base(rows: Sequence[Line]) -> Callable[[str], list[Line]]:
    return lambda task: [row for row in rows if base_task(row) == task]
