"""VPT, Table 12: what every method costs on this machine, and the paper's column of an A100."""

from __future__ import annotations

from bench.tables import cells, cost
from bench.tables.layout import Entry, Layout
from bench.tables.layouts import number
from bench.tables.papers.vpt_main import ADAPTERS
from bench.tables.protocol import ROWS, Protocol, Row, held, method
from bench.tables.spec import MAIN, Request, TableSpec, View, label
from fastpeft.trainer import launch
from fastpeft.trainer.report import Reporter

_PROMPTS = tuple(
    held(f"{name}:p={length}", name, length=length) for length in (1, 200) for name in ("vpt-shallow", "vpt-deep")
)
_ROWS = (
    *(ROWS[name] for name in ("full", "linear", "partial-1", "mlp-3", "sidetune", "bias")), *reversed(ADAPTERS),
    *_PROMPTS,
)  # fmt: skip
# The paper's batch, and one that a CPU has memory for.
_BATCH = {"cuda": 64, "cpu": 16}
_TURNS, _QUICK_TURNS, _QUICK_BATCH = 20, 3, 4
# Column: field of a line, format, the paper's metric, and what its value is divided by. The paper prints ms/img, but
# its values are those of batches of 64.
_COLUMNS = {
    "train ms/img": ("train_ms", "{:.2f}", "train_latency", 64),
    "train GB": ("train_peak_mb", "{:.2f}", "train_peak_memory", 1),
    "test ms/img": ("test_ms", "{:.2f}", "test_latency", 64),
    "test GB": ("test_peak_mb", "{:.2f}", "test_peak_memory", 1),
}


def case_of(request: Request, row: Row) -> cost.Case:
    """A row as it is measured on this machine."""
    backbone = request.backbones[MAIN]
    point = next(iter(Protocol(2, 1, False, (0,)).grid(row)))
    batch = _QUICK_BATCH if request.quick else _BATCH[launch.find_ranks().device.type]
    turns = _QUICK_TURNS if request.quick else _TURNS
    return cost.Case(method(row, point), backbone.name, backbone.image_size, batch, turns, "auto")


def measure(request: Request) -> None:
    """Have every row measured."""
    say = Reporter(True).say
    for row in request.rows:
        if not row.missing and MAIN in request.backbones:
            cost.measure(row.name, case_of(request, row), request.out / cost.FILE, say)


def costs(view: View) -> Layout:
    """Methods by time and memory, the library, the literal implementation, the paper."""
    table = Layout("Cost", ("method", "tuned / total (%)", *[*_COLUMNS] * (len(cost.IMPLEMENTATIONS) + 1)))
    table.over = (
        ("", 1), *((name, len(_COLUMNS)) for name in cost.IMPLEMENTATIONS), ("paper, A100", len(_COLUMNS))
    )  # fmt: skip
    there = cost.lines(view.request.out / cost.FILE)
    for row in view.rows:
        found = _found(view, row, there)
        share = _printed(row, "tuned_over_total")
        own = next((line for line in found.values() if line is not None), None)
        paper = "" if share is None else view.paper(share, form="{:.2f}")
        tuned = None if own is None else float(own["tuned_over_total"])
        entries = [number(tuned, "{:.2f}", paper, ranked=False)]
        for line in found.values():
            entries += [_measured(line, field, form) for field, form, _, _ in _COLUMNS.values()]
        for _, form, metric, divisor in _COLUMNS.values():
            cell = _printed(row, metric)
            entries.append(Entry(form.format(cell.value / divisor) + cell.mark) if cell else Entry())
        table.rows.append((label(row), entries))
    where = case_of(view.request, ROWS["linear"]) if view.request.backbones else None
    if where is not None:
        key = cost.key_of("", "", where)
        table.notes.append(
            f"On {key['device']}, {key['precision']}, batches of {where.batch}, {where.turns} turns of each, medians. "
            "Memory is the peak, model and batch included. Literal: the papers' equations, prompts concatenated, "
            "nothing fused."
        )
    table.notes.append(
        "The paper prints ms/img, but its values are those of batches of 64; they are divided by 64 here. Its "
        "precision is not stated."
    )
    return table


def _found(view: View, row: Row, there: list[cost.Line]) -> dict[str, cost.Line | None]:
    if row.missing or not view.request.backbones:
        return dict.fromkeys(cost.IMPLEMENTATIONS)
    case = case_of(view.request, row)
    return {name: cost.find(there, cost.key_of(row.name, name, case)) for name in cost.IMPLEMENTATIONS}


def _measured(line: cost.Line | None, field: str, form: str) -> Entry:
    if line is None:
        return Entry()
    value = float(line[field])
    return Entry(form.format(value / 1024 if field.endswith("_mb") else value / int(line["batch"])))


def _printed(row: Row, metric: str) -> cells.Cell | None:
    name, _, setting = row.name.partition(":")
    if name.startswith("adapter-"):
        name, setting = "adapter", f"r={name.rpartition('-')[2]}"
    return cells.cell("vpt_table12", method=name, setting=setting, metric=metric)


TABLES = {
    "vpt-12": TableSpec("VPT, Table 12", _ROWS, costs, measure=measure, needs_data=False, plan=lambda request: ())
}
