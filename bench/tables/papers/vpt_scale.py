"""VPT, Fig. 3: every method with a tenth to all of the training images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from bench.tables.layout import Layout
from bench.tables.layouts import number
from bench.tables.measured import mean_of
from bench.tables.protocol import ROWS
from bench.tables.spec import Request, Runs, TableSpec, View, every_row, label
from bench.tables.training_set import TrainingSet
from bench.tables.vpt_or_ft import collected

FRACTIONS = (0.1, 0.2, 0.4, 0.6, 0.8, 1.0)


def plan(request: Request) -> Iterator[Runs]:
    """Every row on every task with every share."""
    for fraction in FRACTIONS:
        for runs in every_row(request):
            yield dataclasses.replace(runs, images=TrainingSet(fraction=fraction))


def by_fraction(view: View) -> list[Layout]:
    """Mean over the tasks of each group, by share."""
    tables = []
    for group, names in view.groups().items():
        if not names:
            continue
        table = Layout(
            f"Share of the training images, mean of {len(names)} {group} tasks",
            ("method", *(f"{fraction:.0%}" for fraction in FRACTIONS)),
        )
        for row in view.rows:
            means = [
                mean_of(collected(view, TrainingSet(fraction=fraction)).get(row.name, {}), names)
                for fraction in FRACTIONS
            ]
            table.rows.append((label(row), [number(mean, "{:.2f}") for mean in means]))
        tables.append(table)
    if not tables:
        tables.append(Layout("Share of the training images", ("method",)))
    tables[-1].notes.append("The paper prints this as a figure, without numbers.")
    return tables


TABLES = {"vpt-fig3": TableSpec("VPT, Fig. 3", tuple(ROWS.values()), by_fraction, groups=("fgvc",), plan=plan)}
