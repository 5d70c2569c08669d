"""Layouts that several tables share."""

from __future__ import annotations

from collections.abc import Sequence

from bench.tables import cells
from bench.tables.layout import Entry, Layout
from bench.tables.measured import Measured, Table, mean_of, total_parameters, wins
from bench.tables.protocol import Row
from bench.tables.spec import MAIN, View, label
from bench.tables.tasks import group_size

WINS = "In square brackets: tasks with a higher mean than full fine-tuning. Bold: the best but for full fine-tuning."


def group_heading(view: View) -> tuple[str, ...]:
    """The groups' names with the number of their tasks that are there."""
    return tuple(
        f"{group} ({len(names)} of {group_size(group) or len(names)})" for group, names in view.groups().items()
    )


def group_entries(
    view: View, row: Row, file: str, role: str = MAIN, found: Table | None = None, **where: str
) -> list[Entry]:
    """Total parameters, then the groups' means with the tasks above full fine-tuning.

    Args:
        view: what there is.
        row: the method.
        file: of the paper's cells.
        role: of the backbone.
        found: the runs, if not the role's own.
        **where: more fields of the paper's cells.
    """
    table = view.found(role) if found is None else found
    tasks, full = table.get(row.name, {}), table.get("full", {})
    groups = view.groups()
    everything = [name for names in groups.values() for name in names]
    every = all(view.whole(group) for group in view.request.spec.groups)
    where = {"method": row.name} | where
    printed = view.paper(cells.cell(file, metric="total_params", **where), role, every)
    entries = [number(total_parameters(row.name, tasks, everything), "{:.2f}x", printed, ranked=False)]
    for group, names in groups.items():
        mean, above = mean_of(tasks, names), None if row.name == "full" else wins(tasks, full, names)
        here = where | {"task": "group_mean", "group": group}
        printed = view.paper(cells.cell(file, metric="accuracy", **here), role, view.whole(group))
        count = cells.cell(file, metric="wins_vs_full", **here)
        if printed and count is not None and count.value is not None:
            printed += f" [{count.value:.0f}]"
        entry = number(mean, "{:.2f}", printed, ranked=row.name != "full")
        entries.append(entry if above is None else Entry(f"{entry.text} [{above}]", entry.value, entry.paper))
    return entries


def accuracy(measured: Measured | None, paper: str = "") -> Entry:
    """Mean and deviation over the seeds."""
    if measured is None:
        return Entry(paper=paper)
    deviation = "" if measured.deviation is None else f" ± {measured.deviation:.1f}"
    return Entry(f"{measured.mean:.1f}{deviation}", measured.mean, paper)


def number(value: float | None, form: str, paper: str = "", ranked: bool = True) -> Entry:
    """A number, or a dash."""
    return Entry(paper=paper) if value is None else Entry(form.format(value), value if ranked else None, paper)


def by_group(view: View, title: str, file: str, role: str = MAIN, **where: str) -> Layout:
    """Methods by groups of tasks: Tables 1, 2, 5, 6 and 11."""
    table = Layout(title, ("method", "total params", *group_heading(view)))
    table.rows = [(label(row), group_entries(view, row, file, role, **where)) for row in view.rows]
    table.notes.append(WINS)
    return table


def by_task(view: View, title: str, file: str, groups: Sequence[str] = ()) -> Layout:
    """Methods by tasks: Tables 13 and 14."""
    found, chosen = view.found(), view.groups()
    names = [name for group, its in chosen.items() if not groups or group in groups for name in its]
    table = Layout(title, ("method", *names))
    for row in view.rows:
        entries = []
        for name in names:
            printed = view.paper(cells.cell(file, method=row.name, task=name, metric="accuracy"))
            entries.append(accuracy(found.get(row.name, {}).get(name), printed))
        table.rows.append((label(row), entries))
    table.notes.append("Mean and deviation over the seeds.")
    return table
