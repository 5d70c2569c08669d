"""The study's tables, from its results alone."""

from __future__ import annotations

from pathlib import Path

from bench.offline import plan
from bench.tables import statistics
from bench.tables.layout import Entry, Layout
from bench.tables.measured import Measured, Table, collect
from bench.tables.results import Line, Results, point_of


def write(results: Results, out: Path) -> None:
    """Write every table as Markdown and LaTeX.

    Args:
        results: of the study.
        out: folder of the tables.

    Raises:
        TableError: the results cannot be read.
    """
    rows = results.rows()
    out.mkdir(parents=True, exist_ok=True)
    for name, table in tables(rows).items():
        (out / f"{name}.md").write_text(table.markdown(), encoding="utf-8")
        (out / f"{name}.tex").write_text(table.latex(), encoding="utf-8")


def tables(rows: list[Line]) -> dict[str, Layout]:
    """Every table by the name of its files."""
    usual, once = collect(rows, plan.BACKBONE, plan.USUAL), collect(rows, plan.BACKBONE, plan.ONE_SHOT)
    return {
        "methods": methods(usual),
        "scales": scales(usual),
        "one-shot": one_shot(once),
        "wilcoxon": wilcoxon(usual),
        "welch": welch(usual),
        "settings": settings(rows),
    }


def methods(found: Table) -> Layout:
    """Methods by tasks."""
    tasks = [part.task for part in plan.MAIN]
    table = _layout("Methods by tasks", ("method", "trained", *(part.title for part in plan.MAIN), "mean"))
    for name in plan.ROWS:
        measured = [found.get(name, {}).get(task) for task in tasks]
        there = [each for each in measured if each]
        mean = sum(each.mean for each in there) / len(there) if len(there) == len(tasks) else None
        trained = Entry(f"{there[0].trained:,}") if there else Entry()
        entries = [trained, *map(accuracy, measured), Entry() if mean is None else Entry(f"{mean:.1f}", mean)]
        table.rows.append((name, entries))
    table.notes.append(
        "Test accuracy in percent, mean and deviation over the seeds; in bold the best of a column. trained: "
        "parameters, with the head of the first task."
    )
    return table


def scales(found: Table) -> Layout:
    """Methods by the number of training images."""
    table = _layout("CIFAR-100 by training images", ("method", *(f"{size:,}" for size in plan.SCALES)))
    for name in ("full", "vpt-deep", "lora"):
        entries = [accuracy(found.get(name, {}).get(task)) for task in plan.SCALES.values()]
        table.rows.append((name, entries))
    table.notes.append(
        "Rates as chosen on CIFAR-100's 800 and 200 images. All are tested on the same images, and all run the same "
        "epochs: more images are more steps. 5,000 images: one seed."
    )
    return table


def one_shot(found: Table) -> Layout:
    """One image a class."""
    table = _layout("CIFAR-100, one training image a class", ("method", "accuracy"), plan.ONE_SHOT)
    for name in ("full", "linear", "vpt-deep", "lora"):
        table.rows.append((name, [accuracy(found.get(name, {}).get(plan.ONE_SHOT_TASK))]))
    table.notes.append("One further image a class chose the learning rate and was not trained on.")
    return table


def wilcoxon(found: Table) -> Layout:
    """VPT-Deep against its rivals, over the tasks."""
    table = _layout("VPT-Deep against its rivals, Wilcoxon signed-rank, one-tailed", ("rival", "p", "tasks"))
    tasks = [part.task for part in plan.MAIN]
    ours = {task: one.accuracies for task, one in found.get("vpt-deep", {}).items() if task in tasks}
    for name in plan.ROWS:
        if name == "vpt-deep":
            continue
        test = statistics.wilcoxon(ours, {task: one.accuracies for task, one in found.get(name, {}).items()})
        entries = [Entry(), Entry("0")] if test is None else [Entry(f"{test.p:.2g}"), Entry(str(test.count))]
        table.rows.append((name, entries))
    table.notes.append(
        f"Pairs are the means over the seeds. With {len(tasks)} tasks no p below {0.5 ** len(tasks):.2g} can come out, "
        "however the methods differ."
    )
    return table


def welch(found: Table) -> Layout:
    """VPT-Deep against its rivals, task by task."""
    parts = plan.MAIN
    table = _layout("VPT-Deep against its rivals, Welch's t, one-tailed", ("rival", *(part.title for part in parts)))
    pairs = []
    for name in plan.ROWS:
        if name == "vpt-deep":
            continue
        entries = []
        for part in parts:
            pair = [found.get(who, {}).get(part.task, Measured()).accuracies for who in ("vpt-deep", name)]
            pairs.append(pair)
            test = statistics.welch(*pair)
            entries.append(Entry() if test is None else Entry(f"{test.p:.2g}"))
        table.rows.append((name, entries))
    table.notes.append("p of VPT-Deep being no better; seeds against seeds, unequal variances.")
    if any(statistics.constant(*pair) for pair in pairs):
        table.notes.append(statistics.CONSTANT)
    return table


def settings(rows: list[Line]) -> Layout:
    """Validation accuracy of each base rate, the chosen one marked."""
    parts = [part for part in plan.PARTS.values() if not part.rates_of]
    table = _layout("Base learning rates and validation accuracy", ("method", *(part.title for part in parts)))
    for name in plan.ROWS:
        table.rows.append((name, [_searched(rows, name, part) for part in parts]))
    table.notes.append(
        f"base rate: validation accuracy in percent, chosen*. The rate in force is base rate x {plan.BATCH} / 256; "
        f"weight decay {plan.DECAY:g}. Optimisers: "
        + ", ".join(f"{row.name} {row.optimizer}" for row in plan.ROWS.values())
        + f". One image a class: {plan.ONE_SHOT_EPOCHS} epochs."
    )
    return table


def _searched(rows: list[Line], method: str, part: plan.Part) -> Entry:
    own = [row for row in rows if (row["method"], row["task"]) == (method, part.task) and _same(row, part.protocol)]
    final = {row["point"] for row in own if row["stage"] == "final"}
    shown = []
    for row in own:
        if row["stage"] == "search":
            mark = "*" if row["point"] in final else ""
            shown.append(f"{point_of(row['point'])['base_lr']:g}: {100 * float(row['accuracy']):.1f}{mark}")
    return Entry("; ".join(shown)) if shown else Entry()


def _same(row: Line, protocol: plan.OfflineProtocol) -> bool:
    there = (row["backbone"], row["image_size"], row["protocol"])
    return there == (str(plan.BACKBONE), str(plan.BACKBONE.image_size), protocol.name)


def accuracy(measured: Measured | None) -> Entry:
    """Mean and deviation of the accuracies, in percent."""
    if measured is None:
        return Entry()
    deviation = "" if measured.deviation is None else f" ± {measured.deviation:.1f}"
    return Entry(f"{measured.mean:.1f}{deviation}", measured.mean)


def _layout(title: str, heading: tuple[str, ...], protocol: plan.OfflineProtocol = plan.USUAL) -> Layout:
    table = Layout(f"{title}: DINOv2 ViT-S/14, {plan.BACKBONE.image_size} px, {protocol.epochs} epochs", heading)
    table.notes.append(f"{plan.BACKBONE.name} at {plan.BACKBONE.image_size} px; {protocol.describe()}.")
    return table
