"""Layouts that several tables share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from bench.tables import cells
from bench.tables.layout import Entry, Layout
from bench.tables.measured import Measured, mean_of, total_parameters, wins
from bench.tables.protocol import Row
from bench.tables.results import point_of
from bench.tables.spec import MAIN, View, label
from bench.tables.tasks import group_size

WINS = "In square brackets: tasks with a higher mean than full fine-tuning. Bold: the best but for full fine-tuning."


def group_heading(view: View) -> tuple[str, ...]:
    """The groups' names with the number of their tasks that are there."""
    return tuple(
        f"{group} ({len(names)} of {group_size(group) or len(names)})" for group, names in view.groups().items()
    )


def group_entries(
    view: View, row: Row, file: str, role: str = MAIN, printed_as: str = "", against_full: bool = True, **where: str
) -> list[Entry]:
    """Total parameters, then the groups' means with the tasks above full fine-tuning.

    Args:
        view: what there is.
        row: the method.
        file: of the paper's cells.
        role: of the backbone.
        printed_as: the method's name in the paper's cells, if not the row's.
        against_full: full fine-tuning is in the table; otherwise nothing is counted against it, and the paper's total,
            which is of other tasks, is left out.
        **where: more fields of the paper's cells.
    """
    table = view.found(role)
    tasks, full = table.get(row.name, {}), table.get("full", {})
    groups = view.groups()
    everything = [name for names in groups.values() for name in names]
    every = all(view.whole(group) for group in view.request.spec.groups)
    where = {"method": printed_as or row.name} | where
    printed = view.paper(cells.cell(file, metric="total_params", **where), role, every, "{:.2f}")
    printed = printed if against_full else ""
    entries = [number(total_parameters(row.name, tasks, everything), "{:.2f}x", printed, ranked=False)]
    for group, names in groups.items():
        mean = mean_of(tasks, names)
        above = wins(tasks, full, names) if against_full and row.name != "full" else None
        here = where | {"task": "group_mean", "group": group}
        printed = view.paper(cells.cell(file, metric="accuracy", **here), role, view.whole(group), "{:.2f}")
        count = cells.cell(file, metric="wins_vs_full", **here) if against_full else None
        if printed and count is not None and count.value is not None:
            printed += f" [{count.said('{:.0f}')}]"
        entry = number(mean, "{:.2f}", printed, ranked=row.name != "full")
        entries.append(entry if above is None else Entry(f"{entry.text} [{above}]", entry.value, entry.paper))
    return entries


def accuracy(measured: Measured | None, paper: str, row: Row) -> Entry:
    """Mean and deviation over the seeds."""
    if measured is None:
        return Entry(paper=paper)
    deviation = "" if measured.deviation is None else f" ± {measured.deviation:.1f}"
    return Entry(f"{measured.mean:.1f}{deviation}", None if row.name == "full" else measured.mean, paper)


def number(value: float | None, form: str, paper: str = "", ranked: bool = True) -> Entry:
    """A number, or a dash."""
    return Entry(paper=paper) if value is None else Entry(form.format(value), value if ranked else None, paper)


# Where the paper's tables have a line between the methods.
_KINDS = (
    ("(a)", ("full",)),
    ("(b)", ("linear", "partial", "mlp", "head")),
    ("(c)", ("sidetune", "bias", "adapter")),
    ("ours", ("vpt",)),
)


def sections(rows: Sequence[Row]) -> dict[int, str]:
    """The papers' division of the methods: by the row that it begins with."""
    kinds = [next((kind for kind, names in _KINDS if row.name.startswith(names)), "") for row in rows]
    return {i: kind for i, kind in enumerate(kinds) if kind and (i == 0 or kinds[i - 1] != kind)}


def by_group(view: View, title: str, file: str, role: str = MAIN, **where: str) -> Layout:
    """Methods by groups of tasks: Tables 1 and 2."""
    table = Layout(title, ("method", "total params", *group_heading(view)))
    table.rows = [(label(row), group_entries(view, row, file, role, **where)) for row in view.rows]
    table.sections = sections(view.rows)
    table.notes.append(WINS)
    return table


def by_groups_of(
    view: View, title: str, file: str, fields: dict[str, dict[str, str]], printed_as: dict[str, str] | None = None
) -> Layout:
    """Methods by groups of tasks, backbones side by side: Tables 5 and 6.

    Args:
        view: what there is.
        title: of the table.
        file: of the paper's cells.
        fields: of the paper's cells of each role.
        printed_as: names of methods in the paper's cells, where they are not the rows'.
    """
    names = printed_as or {}
    heading = ("total params", *group_heading(view))
    table = Layout(title, ("method", *heading * len(fields)))
    table.over = tuple((view.request.spec.role(role).title, len(heading)) for role in fields)
    for row in view.rows:
        entries = []
        for role, where in fields.items():
            entries += group_entries(view, row, file, role, names.get(row.name, ""), **where)
        table.rows.append((label(row), entries))
    table.sections = sections(view.rows)
    table.notes.append(WINS)
    return table


def by_task(view: View, title: str, file: str) -> Layout:
    """Methods by tasks with the groups' means; of prompts their length and share below: Tables 13 and 14."""
    found, groups = view.found(), view.groups()
    table = Layout(title, ("method", *(name for names in groups.values() for name in (*names, "mean"))))
    table.over = tuple((group, len(names) + 1) for group, names in groups.items())
    for row in view.rows:
        tasks = found.get(row.name, {})
        entries = []
        for group, names in groups.items():
            where = {"method": row.name, "metric": "accuracy"}
            for name in names:
                entries.append(
                    accuracy(tasks.get(name), view.paper(cells.cell(file, task=name, **where), form="{:.1f}"), row)
                )
            mean, above = mean_of(tasks, names), wins(tasks, found.get("full", {}), names)
            printed = cells.cell(file, task="group_mean", group=group, **where)
            printed = view.paper(printed, whole=view.whole(group), form="{:.2f}")
            entry = number(mean, "{:.2f}", printed, ranked=row.name != "full")
            counted = "" if above is None or row.name == "full" else f" [{above}]"
            entries.append(Entry(entry.text + counted, entry.value, entry.paper))
        table.rows.append((label(row), entries))
        if row.kind == "prompts":
            table.rows.append(("prompt length", _per_task(view, row, file, "prompt_length", _length, "{:g}")))
            table.rows.append(("tuned / total (%)", _per_task(view, row, file, "tuned_over_total", _share, "{:.2f}")))
    # Prompts come last, so that their further rows move no section.
    table.sections = sections(view.rows)
    table.notes.append(f"Mean and deviation over the seeds. {WINS}")
    return table


def _per_task(
    view: View, row: Row, file: str, metric: str, value: Callable[[Measured], float | None], form: str
) -> list[Entry]:
    """A figure of every task, and its mean over each group."""
    tasks, entries = view.found().get(row.name, {}), []
    for group, names in view.groups().items():
        values = [value(tasks[name]) if name in tasks else None for name in names]
        whole = bool(values) and None not in values
        for name, own in (*zip(names, values, strict=True), ("group_mean", fmean(values) if whole else None)):
            printed = cells.cell(file, method=row.name, metric=metric, task=name, group=group)
            complete = name != "group_mean" or view.whole(group)
            entries.append(number(own, form, view.paper(printed, whole=complete, form=form), ranked=False))
    return entries


def _length(measured: Measured) -> float | None:
    return point_of(measured.points[0]).get("length")


def _share(measured: Measured) -> float | None:
    return 100 * measured.trained / measured.backbone if measured.backbone else None
