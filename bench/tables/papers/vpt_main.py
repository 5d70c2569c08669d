"""VPT, Tables 1, 10, 13 and 14 and Fig. 16: ViT-B/16, all methods, and the significance of their differences."""

from __future__ import annotations

from bench.tables import cells, layouts, statistics
from bench.tables.layout import Entry, Layout
from bench.tables.measured import Measured
from bench.tables.protocol import ROWS, held, of
from bench.tables.spec import VTAB, TableSpec, View, label

MAIN_ROWS = tuple(ROWS.values())
# Tables 13 and 14 have every depth of the MLP and every reduction of the adapter.
MLPS = (
    of("mlp-2", "mlp-3", method={"name": "mlp_head", "k": 2}),
    ROWS["mlp-3"],
    of("mlp-5", "mlp-3", method={"name": "mlp_head", "k": 5}),
    of("mlp-9", "mlp-3", method={"name": "mlp_head", "k": 9}),
)
ADAPTERS = tuple(held(f"adapter-{reduction}", "adapter", reduction=reduction) for reduction in (256, 64, 8))
ALL_ROWS = (
    *(ROWS[name] for name in ("full", "linear", "partial-1")), *MLPS, ROWS["sidetune"], ROWS["bias"], *ADAPTERS,
    ROWS["vpt-shallow"], ROWS["vpt-deep"],
)  # fmt: skip


def by_group(view: View) -> Layout:
    """Table 1: group means, the count of tasks above full fine-tuning in brackets, total parameters."""
    return layouts.by_group(view, "Methods by groups of tasks", "vpt_table01")


def by_task(view: View) -> Layout:
    """Table 13: every task of VTAB-1k."""
    return layouts.by_task(view, "Methods by tasks", "vpt_table13")


def by_fine_task(view: View) -> Layout:
    """Table 14: every fine-grained task."""
    return layouts.by_task(view, "Methods by fine-grained tasks", "vpt_table14")


def rivals(view: View) -> Layout:
    """Table 10: Wilcoxon's signed-rank test of VPT-Deep against each rival, over the tasks."""
    table = Layout("VPT-Deep against its rivals, Wilcoxon signed-rank, one-tailed", ("rival", "p", "tasks"))
    found = view.found()
    ours = {name: measured.accuracies for name, measured in found.get("vpt-deep", {}).items()}
    for row in view.rows:
        if row.name == "vpt-deep":
            continue
        rival = {name: measured.accuracies for name, measured in found.get(row.name, {}).items()}
        test = statistics.wilcoxon(ours, rival)
        printed = cells.cell("vpt_table10", method=f"vpt-deep>{row.name}", metric="wilcoxon_signed_rank_p")
        paper = view.paper(printed, whole=all(view.whole(group) for group in VTAB), form="{:.1e}")
        entry = Entry(paper=paper) if test is None else Entry(f"{test.p:.2g}", None, paper)
        table.rows.append((label(row), [entry, Entry("0" if test is None else str(test.count))]))
    table.notes.append("Pairs are the means over the seeds of every task that both have; the papers have 19.")
    return table


def rivals_by_task(view: View) -> Layout:
    """Fig. 16: Welch's t-test of VPT-Deep against each rival, task by task."""
    names = [name for its in view.groups().values() for name in its]
    table = Layout("VPT-Deep against its rivals, Welch's t, one-tailed", ("rival", *names))
    found, pairs = view.found(), []
    for row in view.rows:
        if row.name == "vpt-deep":
            continue
        entries = []
        for name in names:
            pair = [found.get(who, {}).get(name, Measured()).accuracies for who in ("vpt-deep", row.name)]
            pairs.append(pair)
            test = statistics.welch(*pair)
            printed = cells.cell("vpt_fig16", method=f"vpt-deep>{row.name}", task=name)
            paper = view.paper(printed, form="{:.0e}")
            entries.append(Entry(paper=paper) if test is None else Entry(f"{test.p:.2g}", None, paper))
        table.rows.append((label(row), entries))
    table.notes.append("Seeds against seeds, unequal variances.")
    if any(statistics.constant(*pair) for pair in pairs):
        table.notes.append(statistics.CONSTANT)
    return table


TABLES = {
    "vpt-1": TableSpec("VPT, Table 1", MAIN_ROWS, by_group, groups=("fgvc", *VTAB)),
    "vpt-13": TableSpec("VPT, Table 13", ALL_ROWS, by_task),
    "vpt-14": TableSpec("VPT, Table 14", ALL_ROWS, by_fine_task, groups=("fgvc",)),
    "vpt-10": TableSpec("VPT, Table 10", MAIN_ROWS, rivals),
    "vpt-fig16": TableSpec("VPT, Fig. 16", MAIN_ROWS, rivals_by_task),
}
