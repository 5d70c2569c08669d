"""VPT or FT, Fig. 5 and 9 to 13: losses on training and test images, epoch by epoch."""

from __future__ import annotations

from collections.abc import Iterator

from bench.tables import curves
from bench.tables.layout import Entry, Layout
from bench.tables.results import Line
from bench.tables.spec import MAIN, Request, Runs, TableSpec, View, label
from bench.tables.strategies import CURVE, Curve
from bench.tables.training_set import DEFAULT, TrainingSet
from bench.tables.vpt_or_ft import STRATEGIES, experiments, lacking

# Epochs of the table, as shares of all of a strategy's.
_AT = (0.1, 0.25, 0.5, 0.75, 1.0)


def lines_of(view: View, images: TrainingSet) -> list[Line]:
    """The losses of the view's rows and tasks on a training set, of one run each.

    Raises:
        TableError: a file of losses is not what it should be.
    """
    backbone = view.request.backbones.get(MAIN)
    if backbone is None:
        return []
    names = {row.name for row in view.rows}
    wanted = {
        "stage": CURVE, "backbone": str(backbone), "image_size": str(backbone.image_size), "setting": images.name,
        "protocol": view.request.protocol().name,
    }  # fmt: skip
    return [
        line
        for line in curves.read(view.request.out / curves.FOLDER)
        if all(line[key] == value for key, value in wanted.items())
        and line["method"] in names
        and line["task"] in view.groups_of
    ]


def by_epoch(view: View, images: TrainingSet) -> Layout:
    """Losses at some epochs; all of them are in the folder of the curves."""
    table = Layout(
        f"Losses on training and test images, {images.name or 'the default split'}",
        ("task, method", "epochs", *(f"{split} at {share:.0%}" for split in ("train", "test") for share in _AT)),
    )
    lines = lines_of(view, images)
    for names in view.groups().values():
        for task in names:
            for row in view.rows:
                own = [line for line in lines if (line["task"], line["method"]) == (task, row.name)]
                table.rows.append((f"{task}, {label(row)}", _at_some_epochs(own)))
    table.notes.append(
        "Mean cross-entropy: of the epoch's own steps on training images, after it on test images, of the run with the "
        f"first seed. Every epoch is in {curves.FOLDER}/. FT-then-PT goes on after full fine-tuning's epochs."
    )
    table.notes += lacking(view, images)
    return table


def _at_some_epochs(lines: list[Line]) -> list[Entry]:
    epochs = max((int(line["epoch"]) for line in lines), default=0)
    found = {(line["split"], int(line["epoch"])): line["loss"] for line in lines}
    entries = [Entry(str(epochs)) if epochs else Entry()]
    for split in ("train", "test"):
        for share in _AT:
            loss = found.get((split, max(1, round(share * epochs))))
            entries.append(Entry() if loss is None else Entry(f"{float(loss):.3g}"))
    return entries


def _spec(number: int, groups: tuple[str, ...], images: TrainingSet = DEFAULT) -> TableSpec:
    def plan(request: Request) -> Iterator[Runs]:
        return (Curve(one) for one in experiments(request, (images,)))

    def lay_out(view: View) -> Layout:
        return by_epoch(view, images)

    return TableSpec(f"VPT or FT, Fig. {number}", STRATEGIES, lay_out, groups=groups, plan=plan)


_ALL = ("natural", "specialized", "structured")
# Fig. 5 is a choice of the tasks of Fig. 9 to 11; Fig. 12 and 13 are of enlarged sets.
TABLES = {
    "vptft-fig5": _spec(5, _ALL),
    "vptft-fig9": _spec(9, ("natural",)),
    "vptft-fig10": _spec(10, ("specialized",)),
    "vptft-fig11": _spec(11, ("structured",)),
    "vptft-fig12": _spec(12, _ALL, TrainingSet(5000)),
    "vptft-fig13": _spec(13, _ALL, TrainingSet(10000)),
}
