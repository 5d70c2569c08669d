"""What the tables of the VPT-or-FT paper share: its strategies, the lengths of its prompts, its runs and its layout.

FT: all weights.  VPT: deep prompts.  Mixed: both together.  FT-then-PT: prompts on what FT has tuned.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

from bench.tables import cells
from bench.tables.backbones import fitted, sizes
from bench.tables.experiment import Experiment
from bench.tables.layout import Entry, Layout
from bench.tables.layouts import number
from bench.tables.measured import Measured, collect, mean_of, wins
from bench.tables.protocol import ROWS, Row
from bench.tables.spec import MAIN, Request, Runs, View, label
from bench.tables.strategies import AfterTuning
from bench.tables.tasks import Task
from bench.tables.training_set import DEFAULT, TrainingSet

_PROMPTS = dataclasses.replace(ROWS["vpt-deep"], batch_size=64, halved=False)
FT = ROWS["full"]
VPT = dataclasses.replace(_PROMPTS, name="vpt", title="VPT")
MIXED = dataclasses.replace(_PROMPTS, name="mixed", method=({"name": "full"}, {"name": "vpt"}), title="Mixed")
FT_THEN_PT = dataclasses.replace(_PROMPTS, name="ft-then-pt", title="FT-then-PT")
# Rank, scale and layers are not stated; these are the usual ones.
LORA = dataclasses.replace(ROWS["full"], name="lora", method={"name": "lora", "rank": 8}, title="LoRA")
STRATEGIES = (FT, VPT, MIXED, FT_THEN_PT)
# Names of the rows in this paper's cells, where they are not its own.
_PRINTED = {"full": "ft"}


def fit(row: Row, backbone: str, task: Task, lengths: bool) -> Row:
    """A row as it is trained on a task.

    Args:
        row: one of this module's.
        backbone: timm name.
        task: it is trained on.
        lengths: take the length of the task's prompts from the VPT paper, as the VPT-or-FT paper does for its main
            backbone; a task that it lacks, and every task if not, has its length searched.
    """
    row = fitted(row, backbone)
    if row.kind != "prompts":
        return row
    own = sizes(backbone).prompts
    length = length_of(task) if lengths else None
    searched = row.searched if length is None else {"length": (length,)}
    return dataclasses.replace(row, batch_size=64 if own > 80 else own, searched=searched)


def length_of(task: Task) -> int | None:
    """The VPT paper's chosen length of deep prompts."""
    for file in ("vpt_table13", "vpt_table14"):
        found = cells.cell(file, method="vpt-deep", task=task.name, metric="prompt_length")
        if found is not None and found.value is not None:
            return int(found.value)
    return None


def experiments(
    request: Request, sets: Sequence[TrainingSet] = (DEFAULT,), lengths: bool = True
) -> Iterator[Experiment]:
    """The runs of a request's rows on every task and training set that there is."""
    for role in request.backbones:
        for task, folder in request.tasks.items():
            for images in sets:
                if images.lacking(request.root / folder):
                    continue
                for row in request.rows:
                    if not row.missing:
                        yield experiment(request, role, task, row, images, lengths)


def experiment(
    request: Request, role: str, task: Task, row: Row, images: TrainingSet = DEFAULT, lengths: bool = True
) -> Experiment:
    """A row's runs on a task."""
    backbone = request.backbones[role]
    where = (backbone, request.root, task.name, request.tasks[task])
    protocol = request.protocol(role)

    def of(which: Row, kind=Experiment, **more) -> Experiment:
        return kind(*where, fit(which, backbone.name, task, lengths), protocol, images=images, **more)

    if row.name == FT_THEN_PT.name:
        return of(row, AfterTuning, tuning=of(FT, final=False), runs=request.out / "runs")
    return of(row)


def plan(sets: Sequence[TrainingSet] = (DEFAULT,), lengths: bool = True):
    """A table's plan."""

    def runs(request: Request) -> Iterator[Runs]:
        return experiments(request, sets, lengths)

    return runs


def by_task(
    view: View, title: str, files: Mapping[str, str], setting: str, images: TrainingSet, role: str = MAIN
) -> Layout:
    """Strategies by tasks, each group followed by its mean.

    Args:
        view: what there is.
        title: of the table.
        files: of the paper's cells, by group.
        setting: of the paper's cells.
        images: that were trained on.
        role: of the backbone.
    """
    groups = {group: names for group, names in view.groups().items() if names}
    columns = [name for group, names in groups.items() for name in (*names, f"{group} mean")]
    table = Layout(title, ("method", *columns))
    found = collected(view, images, role)
    for row in view.rows:
        tasks, full = found.get(row.name, {}), found.get(FT.name, {})
        entries: list[Entry] = []
        for group, names in groups.items():
            printed = functools.partial(_printed, files.get(group), row, setting)
            for name in names:
                entries.append(_accuracy(tasks.get(name), view.paper(printed("accuracy", name), role)))
            paper = view.paper(printed("accuracy", "group_mean"), role, view.whole(group))
            count = printed("wins_vs_full", "group_mean")
            if paper and count is not None and count.value is not None:
                paper += f" [{count.said('{:.0f}')}]"
            mean = number(mean_of(tasks, names), "{:.2f}", paper)
            above = None if row.name == FT.name else wins(tasks, full, names)
            entries.append(mean if above is None else Entry(f"{mean.text} [{above}]", mean.value, mean.paper))
        table.rows.append((label(row), entries))
    table.notes.append(
        "Mean and deviation over the seeds; in square brackets the tasks with a higher mean than full fine-tuning."
    )
    table.notes += lacking(view, images)
    return table


def _accuracy(measured: Measured | None, paper: str) -> Entry:
    """Mean and deviation over the seeds; here full fine-tuning is one of those that compete."""
    if measured is None:
        return Entry(paper=paper)
    deviation = "" if measured.deviation is None else f" ± {measured.deviation:.1f}"
    return Entry(f"{measured.mean:.1f}{deviation}", measured.mean, paper)


def _printed(file: str | None, row: Row, setting: str, metric: str, task: str) -> cells.Cell | None:
    if file is None:
        return None
    name = _PRINTED.get(row.name, row.name)
    return cells.cell(file, method=name, setting=setting, metric=metric, task=task)


def collected(view: View, images: TrainingSet, role: str = MAIN):
    """Final runs on a training set, by row and task; {} for a backbone that is not given."""
    backbone = view.request.backbones.get(role)
    return {} if backbone is None else collect(view.lines, backbone, view.request.protocol(role), images.name)


def lacking(view: View, images: TrainingSet) -> list[str]:
    """Which tasks have too few images for a training set, in sentences."""
    said = []
    for task, folder in view.request.tasks.items():
        why = images.lacking(view.request.root / folder)
        if why:
            said.append(f"No {images.name} of {task.name}: {why}.")
    return said
