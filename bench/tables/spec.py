"""What a table is: its rows, the backbones it is made with, the runs it rests on, and how it is laid out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from typing import Protocol as Interface

from bench.tables import cells
from bench.tables.backbones import fitted
from bench.tables.experiment import Experiment
from bench.tables.job import Backbone, Job
from bench.tables.layout import Layout
from bench.tables.measured import Table, collect
from bench.tables.protocol import Protocol, Row
from bench.tables.results import Line, Results
from bench.tables.tasks import TASKS, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VTAB = ("natural", "specialized", "structured")
MAIN = "main"
# Behind a paper's number that is not of the same thing.
OTHER_DATA, OTHER_RUNS = "†", "‡"

# Cells of fewer runs that a note names.
_SHOWN = 20


@dataclass(frozen=True)
class Role:
    """A backbone of a table.

    Attributes:
        name: as `--backbone NAME=...` has it.
        backbone: timm name of the paper's.
        weights: what the paper's was trained on; roles with equal backbone and weights may be one and the same.
        image_size: side of the paper's square input in pixels.
        title: as the paper prints it.
        model: fields of a configuration's `model` that go with it.
        known_as: what the paper's weights are called, as `weights_of` has it: their published file, or timm's name of
            them. The name is all that is looked at.
    """

    name: str = MAIN
    backbone: str = "vit_base_patch16_224"
    weights: str = "supervised on ImageNet-21k"
    image_size: int = 224
    title: str = "ViT-B/16"
    model: tuple[tuple[str, object], ...] = ()
    known_as: tuple[str, ...] = ("ViT-B_16.npz", "imagenet21k_ViT-B_16.npz", "vit_base_patch16_224.orig_in21k@hub")

    def __str__(self) -> str:
        return f"{self.backbone} at {self.image_size} px, {self.weights}"


def weights_of(backbone: Backbone) -> str:
    """What a backbone's weights are known as: a file's name without its folder, NAME.TAG@hub, else what was given."""
    if backbone.weights == "hub":
        return f"{backbone.name}@hub"
    return Path(backbone.weights or "random").name


class Runs(Interface):
    """Runs that belong together: a search and what follows from it."""

    size: int

    def batches(self, results: Results) -> Iterator[list[Job]]:
        """Lists of runs, in order; a list is asked for when all runs of the ones before are in the results."""
        ...


@dataclass(frozen=True)
class Request:
    """A table asked for, and what there is to make it with.

    Attributes:
        spec: the table.
        rows: of its rows, those that were asked for.
        backbones: by role; a role that is not given is missing here.
        tasks: with their folders.
        root: of the data; None for a table that needs none.
        out: where results go.
        quick: as --quick.
        seeds: number of final runs.
        epochs: as --epochs.
    """

    spec: TableSpec
    rows: tuple[Row, ...]
    backbones: Mapping[str, Backbone]
    tasks: Mapping[Task, str]
    root: Path | None
    out: Path
    quick: bool = False
    seeds: int = 5
    epochs: int | None = None

    def protocol(self, role: str = MAIN) -> Protocol:
        """The one that a role's backbone is trained by."""
        return Protocol.of(self.backbones[role].name, self.quick, self.seeds, self.epochs)

    def described(self, role: str = MAIN) -> str:
        """How a role's numbers come about: its protocol; of a table that trains nothing, how much is measured."""
        if self.spec.needs_data:
            return self.protocol(role).describe()
        return "quick, thinned to a few turns of small batches" if self.quick else "all turns of full batches"

    def row(self, row: Row, role: str = MAIN) -> Row:
        """The row as it is trained on a role's backbone: batch size and lengths are the backbone's."""
        return fitted(row, self.backbones[role].name)


@dataclass(frozen=True)
class TableSpec:
    """A table of a paper.

    Attributes:
        title: what it is.
        rows: its methods. A name stands for the same row in every table: results are found by it.
        lay_out: from what was measured to the table, or to several, one below the other.
        roles: the backbones that it needs.
        groups: of its tasks.
        tasks: names of its tasks, if it has not all tasks of its groups.
        plan: the runs that it rests on; the default searches and trains every row on every task with every backbone.
        measure: has the measurements made that are no training runs; called before the layout.
        needs_data: whether there is nothing to do without a folder of tasks.
        missing: why the library cannot make it, or "".
        draw: a figure of its own, which no single study has; None comes back where there is nothing of it.
    """

    title: str
    rows: tuple[Row, ...]
    lay_out: Callable[[View], Layout | list[Layout]]
    roles: tuple[Role, ...] = (Role(),)
    groups: tuple[str, ...] = VTAB
    tasks: tuple[str, ...] | None = None
    plan: Callable[[Request], Iterable[Runs]] = field(default=lambda request: every_row(request))
    measure: Callable[[Request], None] | None = None
    needs_data: bool = True
    missing: str = ""
    draw: Callable[[View], Figure | None] = lambda view: None

    def role(self, name: str) -> Role:
        """By name."""
        return next(role for role in self.roles if role.name == name)

    def takes(self, task: Task) -> bool:
        """Whether a task is one of the table's."""
        return task.group in self.groups and (self.tasks is None or task.name in self.tasks)


def every_row(request: Request, wanted: Callable[[str, Row], bool] = lambda role, row: True) -> Iterator[Experiment]:
    """The runs of a table that searches and trains every row on every task with every backbone.

    Args:
        request: the table.
        wanted: whether a row is trained with a role's backbone.
    """
    for role, backbone in request.backbones.items():
        protocol = request.protocol(role)
        for task, folder in request.tasks.items():
            for row in request.rows:
                if not row.missing and wanted(role, row):
                    yield Experiment(backbone, request.root, task.name, folder, request.row(row, role), protocol)


class View:
    """What a layout sees.

    Attributes:
        request: the table that was asked for.
        lines: rows of the results, of the request's tasks.
        groups_of: group by name of task.
    """

    def __init__(self, request: Request, lines: list[Line]) -> None:
        self.request = request
        self.groups_of = {task.name: task.group for task in request.tasks}
        self.lines = [line for line in lines if line["task"] in self.groups_of]

    @property
    def rows(self) -> tuple[Row, ...]:
        """The methods that were asked for."""
        return self.request.rows

    def found(self, role: str = MAIN) -> Table:
        """Final runs with a role's backbone, by row and task; {} for a role that is not given."""
        backbone = self.request.backbones.get(role)
        return {} if backbone is None else collect(self.lines, backbone, self.request.protocol(role))

    def groups(self) -> dict[str, list[str]]:
        """The table's groups with the tasks that are there, in the papers' order; what no paper has comes last."""
        order = {task.name: number for number, task in enumerate(TASKS)}
        own = self.request.spec.groups
        found = {}
        for group in (*own, *sorted(set(self.groups_of.values()) - set(own))):
            names = [name for name, its in self.groups_of.items() if its == group]
            found[group] = sorted(names, key=lambda name: order.get(name, len(order)))
        return found

    def whole(self, group: str) -> bool:
        """Whether every task of a group is there."""
        wanted = [task.name for task in TASKS if task.group == group and self.request.spec.takes(task)]
        return bool(wanted) and set(wanted) <= set(self.groups_of)

    def same(self, role: str = MAIN) -> bool:
        """Whether a role's runs are the paper's but for the seeds: its backbone, image size, weights and protocol."""
        given = self.request.backbones.get(role)
        if given is None:
            return True
        paper = self.request.spec.role(role)
        usual = Protocol.of(given.name, False, self.request.seeds)
        alike = (given.name.split(".")[0], given.image_size) == (paper.backbone, paper.image_size)
        # Without data nothing is trained: time and memory are those of any weights.
        alike = alike and (not self.request.spec.needs_data or weights_of(given) in paper.known_as)
        return alike and self.request.protocol(role).name == usual.name

    def paper(self, printed: cells.Cell | None, role: str = MAIN, whole: bool = True, form: str | None = None) -> str:
        """A paper's number as it stands beside ours, marked where it is of other data or other runs.

        Args:
            printed: the number; "" if there is none.
            role: whose backbone it is of.
            whole: all of the paper's tasks that it is the mean of are there.
            form: of the number.
        """
        if printed is None or printed.value is None:
            return ""
        text = str(printed) if form is None else printed.said(form)
        return text + ("" if whole else OTHER_DATA) + ("" if self.same(role) else OTHER_RUNS)

    def title(self) -> str:
        """What a figure of it is of: the table, its backbones, their protocols."""
        there = self.request.backbones.items()
        backbones = dict.fromkeys(f"{backbone} at {backbone.image_size} px" for _, backbone in there)
        protocols = dict.fromkeys(self.request.protocol(role).name for role, _ in there)
        return f"{self.request.spec.title}: {'; '.join([*backbones, *protocols])}"

    def notes(self) -> list[str]:
        """What is to be said below every table: protocol, backbones, what differs from the paper, what is missing."""
        spec, said = self.request.spec, []
        by_protocol: dict[str, list[str]] = {}
        for role, backbone in self.request.backbones.items():
            name = "" if len(spec.roles) == 1 else f"{role}: "
            ones = by_protocol.setdefault(self.request.described(role), [])
            weights = "" if backbone.weights else ", random weights"
            given = f"{backbone} at {backbone.image_size} px{weights}"
            ones.append(f"{name}{given} (the paper's: {spec.role(role)})")
        for protocol, ones in by_protocol.items():
            said.append(f"{'; '.join(ones)}. Protocol: {protocol}.")
        marks = ", ".join(f"{mark} {why}" for mark, why in cells.MEANING.items())
        said.append(f"In round brackets the paper's number; {marks}.")
        lacking = [task.name for task in TASKS if spec.takes(task) and task.name not in self.groups_of]
        if spec.needs_data and lacking:
            said.append(f"{OTHER_DATA} Of tasks that are not here too. Not in the data: {', '.join(lacking)}.")
        if not all(map(self.same, self.request.backbones)):
            said.append(
                f"{OTHER_RUNS} Of another backbone, image size, protocol or other weights than ours: of the paper's, "
                "as said above, by its full protocol."
            )
        absent = [str(role) for role in spec.roles if role.name not in self.request.backbones]
        if absent:
            said.append(f"No backbone was given for: {'; '.join(absent)}.")
        if spec.missing:
            said.append(f"Not in the library: {spec.missing}.")
        return [*said, *self._fewer()]

    def _fewer(self) -> list[str]:
        """Which cells are of fewer runs than the protocol has seeds, as of a study that goes on."""
        rows = {row.name for row in self.rows}
        found = {}
        for role, backbone in self.request.backbones.items():
            protocol = self.request.protocol(role)
            for setting in sorted({line["setting"] for line in self.lines}):
                for method, tasks in collect(self.lines, backbone, protocol, setting).items():
                    for task, measured in tasks.items() if method in rows else ():
                        if len(measured.accuracies) < len(protocol.seeds):
                            where = " ".join(filter(None, (method, "on", task, setting)))
                            found[where] = f"{len(measured.accuracies)} of {len(protocol.seeds)}"
        if not found:
            return []
        shown = [f"{where} ({runs})" for where, runs in found.items()]
        more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
        return [f"Of fewer runs than there are seeds: {', '.join(shown[:_SHOWN])}{more}."]


def label(row: Row) -> str:
    """A row's name; of one that cannot be had, that it is so."""
    return f"{row.title or row.name} (not in the library)" if row.missing else row.title or row.name
