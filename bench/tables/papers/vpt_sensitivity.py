"""VPT, Fig. 17: validation accuracy by learning rate and weight decay, on Kitti."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from bench.tables.layout import Layout
from bench.tables.layouts import number
from bench.tables.protocol import ROWS, Row
from bench.tables.results import point_of
from bench.tables.spec import MAIN, Request, Runs, TableSpec, View, every_row, label

_TASK = "kitti"


def plan(request: Request) -> Iterator[Runs]:
    """The searches alone: Tables 1 and 13 have the same."""
    for runs in every_row(request):
        yield dataclasses.replace(runs, final=False)


def sensitivity(view: View) -> list[Layout]:
    """A table a method, task and number of prompts (or reduction): rates by decays."""
    tables = []
    for task in view.groups_of:
        for row in view.rows:
            found = _searched(view, row, task)
            for held in sorted({held for held, _, _ in found}):
                name = ", ".join([label(row), *(f"{key} {value:g}" for key, value in held)])
                scores = {at[1:]: score for at, score in found.items() if at[0] == held}
                tables.append(_by_rate(f"{name} on {task}", scores))
    # A title that says it is empty, rather than no table.
    tables = tables or [Layout("Nothing searched yet", ("learning rate",))]
    tables[-1].notes.append("Accuracy on val200 at the last epoch, in percent. The paper shows this as a figure.")
    return tables


def _searched(view: View, row: Row, task: str) -> dict[tuple, float]:
    """Validation accuracy by what else was searched, learning rate and weight decay."""
    backbone = view.request.backbones.get(MAIN)
    if backbone is None:
        return {}
    wanted = {"task": task, "method": row.name, "stage": "search", "backbone": str(backbone)}
    wanted |= {"image_size": str(backbone.image_size), "protocol": view.request.protocol().name, "setting": ""}
    found = {}
    for line in view.lines:
        if all(line[key] == value for key, value in wanted.items()):
            point = point_of(line["point"])
            rate, decay = point.pop("base_lr"), point.pop("weight_decay")
            found[tuple(sorted(point.items())), rate, decay] = 100 * float(line["accuracy"])
    return found


def _by_rate(title: str, scores: dict[tuple[float, float], float]) -> Layout:
    rates = sorted({rate for rate, _ in scores}, reverse=True)
    decays = sorted({decay for _, decay in scores}, reverse=True)
    table = Layout(title, ("learning rate", *(f"decay {decay:g}" for decay in decays)), best_of="all")
    for rate in rates:
        table.rows.append((f"{rate:g}", [number(scores.get((rate, decay)), "{:.1f}") for decay in decays]))
    return table


TABLES = {
    "vpt-fig17": TableSpec("VPT, Fig. 17", tuple(ROWS.values()), sensitivity, tasks=(_TASK,), plan=plan),
}
