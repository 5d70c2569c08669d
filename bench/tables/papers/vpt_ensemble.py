"""VPT, Fig. 15: five runs of every method on their own, the best of them, and all of them together."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

from matplotlib.figure import Figure

from bench.figures import ensembles
from bench.tables import cells
from bench.tables.ensemble import STAGE, Ensemble
from bench.tables.layout import Entry, Layout
from bench.tables.layouts import group_heading, number
from bench.tables.protocol import ROWS, Row
from bench.tables.results import point_of
from bench.tables.spec import MAIN, Request, Runs, TableSpec, View, label

_COLUMNS = ("average", "best", "ensemble", "ensemble_minus_average")


def plan(request: Request) -> Iterator[Runs]:
    """Every row on every task, and the ensemble of its seeds."""
    for role, backbone in request.backbones.items():
        for task, folder in request.tasks.items():
            for row in request.rows:
                if not row.missing:
                    where = (backbone, request.root, task.name, folder)
                    yield Ensemble(*where, request.row(row, role), request.protocol(role))


def together(view: View) -> dict[tuple[str, str], float]:
    """Accuracies of the ensembles of as many members as there are seeds, in percent, by row and task."""
    backbone = view.request.backbones.get(MAIN)
    if backbone is None:
        return {}
    protocol = view.request.protocol()
    wanted = {
        "stage": STAGE, "backbone": str(backbone), "image_size": str(backbone.image_size), "protocol": protocol.name,
        "setting": "",
    }  # fmt: skip
    return {
        (line["method"], line["task"]): 100 * float(line["accuracy"])
        for line in view.lines
        if all(line[key] == value for key, value in wanted.items())
        and point_of(line["point"]).get("members") == len(protocol.seeds)
    }


def values_of(view: View) -> dict[tuple[str, str], dict[str, float | None]]:
    """The columns' group means by row and group, None for those that lack a task."""
    found, asked = view.found(), together(view)
    means = {}
    for row in view.rows:
        tasks = found.get(row.name, {})
        for group, names in view.groups().items():
            values: dict[str, float | None] = dict.fromkeys(_COLUMNS)
            if names and all(name in tasks for name in names):
                values["average"] = fmean(tasks[name].mean for name in names)
                values["best"] = fmean(max(tasks[name].accuracies) for name in names)
            if names and all((row.name, name) in asked for name in names):
                values["ensemble"] = fmean(asked[row.name, name] for name in names)
            if values["average"] is not None and values["ensemble"] is not None:
                values["ensemble_minus_average"] = values["ensemble"] - values["average"]
            means[row.name, group] = values
    return means


def _printed(row: Row, group: str, column: str) -> cells.Cell | None:
    return cells.cell("vpt_fig15", method=row.name, group=group, setting=f"five_runs:{column}")


def draw(view: View) -> Figure | None:
    """Fig. 15 as the paper has it."""
    means, ours, papers = values_of(view), {}, {}
    for heading, group in zip(group_heading(view), view.groups(), strict=True):
        for row in view.rows:
            printed = {column: _printed(row, group, column) for column in ensembles.SHOWN}
            ours.setdefault(heading, {})[row.name] = means[row.name, group]
            papers.setdefault(heading, {})[row.name] = {column: cell and cell.value for column, cell in printed.items()}
    return ensembles.of_runs(ours, papers)


def by_group(view: View) -> Layout:
    """Group means of the runs' average, of the best run, of the ensemble, and what the ensemble adds to the average."""
    groups = [group for group, names in view.groups().items() if names]
    table = Layout(
        f"{len(view.request.protocol().seeds) if view.request.backbones else 5} runs and their ensemble",
        ("method", *(f"{group} {column.replace('_', ' ')}" for group in groups for column in _COLUMNS)),
    )
    means = values_of(view)
    for row in view.rows:
        entries = []
        for group in groups:
            for column, value in means[row.name, group].items():
                paper = view.paper(_printed(row, group, column), whole=view.whole(group))
                entries.append(number(value, "{:+.2f}" if "minus" in column else "{:.2f}", paper))
        table.rows.append((label(row), entries or [Entry()] * (len(table.heading) - 1)))
    table.notes.append(
        "The best run of a task is that with the highest test accuracy. An ensemble's prediction is the mean of its "
        "members' probabilities; members that differ in prompts and heads alone are asked in one pass."
    )
    return table


TABLES = {"vpt-fig15": TableSpec("VPT, Fig. 15", tuple(ROWS.values()), by_group, plan=plan, draw=draw)}
