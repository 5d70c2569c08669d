"""The tables over VTAB-1k's tasks: methods by groups, by tasks, and the significance tests between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.tables import cells, statistics
from bench.tables.layout import Entry, Layout
from bench.tables.measured import Measured, Table, mean_of, total_parameters, wins
from bench.tables.protocol import ROWS
from bench.tables.tasks import GROUPS, TASKS, group_size

_PAPERS_BACKBONE = "vit_base_patch16_224"
_MAIN = ("full", "linear", "partial-1", "mlp-3", "sidetune", "bias", "adapter", "vpt-shallow", "vpt-deep")


@dataclass(frozen=True)
class TableSpec:
    """A table of a paper.

    Attributes:
        title: what it is.
        methods: its rows, names of `bench.tables.protocol.ROWS`.
        lay_out: from what was measured, the groups of the tasks that are there, and the methods, to the table.
    """

    title: str
    methods: tuple[str, ...]
    lay_out: Callable[[Table, Mapping[str, str], tuple[str, ...]], Layout]


def _groups(groups_of: Mapping[str, str]) -> dict[str, list[str]]:
    """Tasks by group, in the papers' order; tasks that no paper has come last."""
    order = {task.name: number for number, task in enumerate(TASKS)}
    found: dict[str, list[str]] = {}
    for group in (*GROUPS, *sorted(set(groups_of.values()) - set(GROUPS))):
        names = sorted(
            (name for name, own in groups_of.items() if own == group), key=lambda n: order.get(n, len(order))
        )
        if names:
            found[group] = names
    return found


def by_group(found: Table, groups_of: Mapping[str, str], methods: tuple[str, ...]) -> Layout:
    """Table 1: group means, the count of tasks above full fine-tuning in brackets, total parameters."""
    groups = _groups(groups_of)
    counted = [f"{group} ({len(names)} of {group_size(group) or len(names)})" for group, names in groups.items()]
    table = Layout("Methods by groups of tasks", ("method", "total params", *counted))
    for method in methods:
        tasks, full = found.get(method, {}), found.get("full", {})
        everything = [name for names in groups.values() for name in names]
        total = total_parameters(method, tasks, everything)
        entries = [_number(total, "{:.2f}x", None, cells.cell("vpt_table01", method=method, metric="total_params"))]
        for group, names in groups.items():
            mean, above = mean_of(tasks, names), None if method == "full" else wins(tasks, full, names)
            printed = cells.cell("vpt_table01", method=method, task="group_mean", group=group, metric="accuracy")
            entry = _number(mean, "{:.2f}", mean, printed)
            entries.append(entry if above is None else Entry(f"{entry.text} [{above}]", entry.value, entry.paper))
        table.rows.append((_label(method), entries))
    table.notes.append("In square brackets: tasks with a higher mean than full fine-tuning.")
    return table


def by_task(found: Table, groups_of: Mapping[str, str], methods: tuple[str, ...]) -> Layout:
    """Table 13: every task, mean and deviation over the seeds."""
    names = [name for group in _groups(groups_of).values() for name in group]
    table = Layout("Methods by tasks", ("method", *names))
    for method in methods:
        entries = []
        for name in names:
            measured = found.get(method, {}).get(name)
            printed = cells.cell("vpt_table13", method=method, task=name, metric="accuracy")
            entries.append(_accuracy(measured, printed))
        table.rows.append((_label(method), entries))
    table.notes.append("Mean and deviation over the seeds.")
    return table


def rivals(found: Table, groups_of: Mapping[str, str], methods: tuple[str, ...]) -> Layout:
    """Table 10: Wilcoxon's signed-rank test of VPT-Deep against each rival, over the tasks."""
    table = Layout("VPT-Deep against its rivals, Wilcoxon signed-rank, one-tailed", ("rival", "p", "tasks"))
    ours = {name: measured.accuracies for name, measured in found.get("vpt-deep", {}).items() if name in groups_of}
    for method in methods:
        if method == "vpt-deep":
            continue
        rival = {name: measured.accuracies for name, measured in found.get(method, {}).items()}
        test = statistics.wilcoxon(ours, rival)
        printed = cells.cell("vpt_table10", method=f"vpt-deep>{method}", metric="wilcoxon_signed_rank_p")
        paper = "" if printed is None or printed.value is None else f"{printed.value:.1e}"
        entry = Entry(paper=paper) if test is None else Entry(f"{test.p:.2g}", None, paper)
        table.rows.append((_label(method), [entry, Entry("0" if test is None else str(test.count))]))
    table.notes.append("Pairs are the means over the seeds of every task that both have; the papers have 19.")
    return table


def rivals_by_task(found: Table, groups_of: Mapping[str, str], methods: tuple[str, ...]) -> Layout:
    """Fig. 16: Welch's t-test of VPT-Deep against each rival, task by task."""
    names = [name for group in _groups(groups_of).values() for name in group]
    table = Layout("VPT-Deep against its rivals, Welch's t, one-tailed", ("rival", *names))
    for method in methods:
        if method == "vpt-deep":
            continue
        entries = []
        for name in names:
            pair = [found.get(who, {}).get(name, Measured()).accuracies for who in ("vpt-deep", method)]
            test = statistics.welch(*pair)
            entries.append(Entry() if test is None else Entry(f"{test.p:.2g}"))
        table.rows.append((_label(method), entries))
    table.notes.append("Seeds against seeds, unequal variances.")
    return table


TABLES = {
    "vpt-1": TableSpec("VPT, Table 1", _MAIN, by_group),
    "vpt-13": TableSpec("VPT, Table 13", _MAIN, by_task),
    "vpt-10": TableSpec("VPT, Table 10", _MAIN, rivals),
    "vpt-fig16": TableSpec("VPT, Fig. 16", _MAIN, rivals_by_task),
}


def differences(backbone: str, image_size: int, groups_of: Mapping[str, str]) -> list[str]:
    """Why the papers' numbers are not these runs', in sentences; empty where only the seeds differ."""
    found = []
    if backbone != _PAPERS_BACKBONE or image_size != 224:
        found.append(
            f"The papers' numbers are of {_PAPERS_BACKBONE} at 224 px, these of {backbone} at {image_size} px."
        )
    lacking = [task.name for task in TASKS if task.name not in groups_of]
    if lacking:
        found.append(f"Not in the data: {', '.join(lacking)}.")
    return found


def _label(method: str) -> str:
    return f"{method} (not in the library)" if ROWS[method].missing else method


def _accuracy(measured: Measured | None, printed: cells.Cell | None) -> Entry:
    paper = "" if printed is None else str(printed)
    if measured is None:
        return Entry(paper=paper)
    deviation = "" if measured.deviation is None else f" ± {measured.deviation:.1f}"
    return Entry(f"{measured.mean:.1f}{deviation}", measured.mean, paper)


def _number(value: float | None, form: str, rank: float | None, printed: cells.Cell | None) -> Entry:
    paper = "" if printed is None else str(printed)
    return Entry(paper=paper) if value is None else Entry(form.format(value), rank, paper)
