"""VPT, Table 3: prompts and biases together."""

from __future__ import annotations

from bench.tables import cells
from bench.tables.layout import Entry, Layout
from bench.tables.layouts import WINS, number
from bench.tables.measured import mean_of, wins
from bench.tables.protocol import ROWS, Row, of
from bench.tables.spec import TableSpec, View, label
from bench.tables.tasks import group_size

_BITFIT = {"name": "bitfit"}
# The released code trains both by SGD, over the prompts' learning rates.
BOTH = {
    name: of(f"{name}+bias", name, method=({**ROWS[name].method}, _BITFIT), rates=ROWS["vpt-deep"].rates)
    for name in ("vpt-shallow", "vpt-deep")
}
_ROWS = (
    ROWS["full"], ROWS["bias"], ROWS["vpt-shallow"], BOTH["vpt-shallow"], ROWS["vpt-deep"], BOTH["vpt-deep"],
)  # fmt: skip


def together(view: View) -> Layout:
    """Groups by methods; behind a sum its change against the prompts alone."""
    # Full fine-tuning is there to be won against.
    rows = [row for row in view.rows if row.name != "full"]
    table = Layout("Prompts and biases", ("group", *map(label, rows)), best_of="row")
    for group, names in view.groups().items():
        counted = f"{group} ({len(names)} of {group_size(group) or len(names)})"
        table.rows.append((counted, [_entry(view, row, group, names) for row in rows]))
    table.notes.append(f"{WINS} Behind an arrow: the change against the prompts alone.")
    return table


def _entry(view: View, row: Row, group: str, names: list[str]) -> Entry:
    found = view.found()
    tasks, full, alone = (found.get(name, {}) for name in (row.name, "full", row.name.removesuffix("+bias")))
    where = {"method": row.name, "task": "group_mean", "group": group}
    printed = view.paper(cells.cell("vpt_table03", metric="accuracy", **where), whole=view.whole(group), form="{:.2f}")
    count = cells.cell("vpt_table03", metric="wins_vs_full", **where)
    printed += f" [{count}]" if printed and count is not None else ""
    mean, before, above = mean_of(tasks, names), mean_of(alone, names), wins(tasks, full, names)
    entry = number(mean, "{:.2f}", printed)
    text = entry.text + ("" if above is None else f" [{above}]")
    if mean is not None and before is not None and row.name.endswith("+bias"):
        text += f" →{mean - before:+.2f}"
    return Entry(text, entry.value, entry.paper)


TABLES = {"vpt-3": TableSpec("VPT, Table 3", _ROWS, together)}
