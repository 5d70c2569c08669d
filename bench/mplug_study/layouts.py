"""The study's figures as tables: it prints no numbers, so these stand alone."""

from __future__ import annotations

from collections.abc import Sequence

from bench.mplug_study.measured import Cell, diverged, reference_size, share
from bench.mplug_study.methods import FULL
from bench.mplug_study.protocol import Protocol, Schedule
from bench.tables.layout import Entry, Layout
from bench.tables.results import Line

_NO_NUMBERS = "The study shows this as a figure, without numbers."


def by_ratio(found: Sequence[Cell], protocol: Protocol, schedule: Schedule, corpus: str) -> Layout:
    """Score by share of the training samples, every method at one size."""
    ratios = sorted({cell.ratio for cell in found})
    table = Layout(f"{schedule.title} by share of the data, {corpus}", ("method", "trained", *map(share, ratios)))
    for name, tuning in protocol.tunings.items():
        size = reference_size(found, name, tuning.reference)
        for classifier in (False, True):
            own = {
                cell.ratio: cell
                for cell in found
                if (cell.method, cell.size, cell.classifier) == (name, size, classifier)
            }
            if own:
                label = _label(tuning.title, tuning.knob, size, classifier)
                trained = Entry(f"{next(iter(own.values())).trained:,}")
                table.rows.append((label, [trained, *(_entry(own.get(ratio)) for ratio in ratios)]))
    table.notes.append(_NO_NUMBERS)
    return table


def by_size(found: Sequence[Cell], protocol: Protocol, schedule: Schedule, corpus: str) -> Layout:
    """Score by size of the module, with the largest share of the data."""
    most = max((cell.ratio for cell in found), default=1.0)
    found = [cell for cell in found if cell.ratio == most]
    sizes = sorted({cell.size for cell in found if cell.method != FULL})
    table = Layout(
        f"{schedule.title} by size of the module, {share(most)} of the data, {corpus}",
        ("method", *(str(size) for size in sizes)),
        best_of="row",
    )
    for name, tuning in protocol.tunings.items():
        for classifier in (False, True):
            own = {cell.size: cell for cell in found if (cell.method, cell.classifier) == (name, classifier)}
            if not own:
                continue
            if name == FULL:
                table.notes.append(f"Full fine-tuning: {_entry(own[0]).text}, {own[0].trained:,} parameters.")
                continue
            label = f"{tuning.title} ({tuning.knob}){' and classifier' if classifier else ''}"
            table.rows.append((label, [_entry(own.get(size)) for size in sizes]))
    table.notes.append(_NO_NUMBERS)
    return table


def by_cost(found: Sequence[Cell], protocol: Protocol, schedule: Schedule, corpus: str) -> Layout:
    """Score by training samples times trained parameters."""
    table = Layout(
        f"{schedule.title} by samples times trained parameters, {corpus}",
        ("setting", "samples", "trained", "samples times trained", schedule.title),
    )
    for cell in sorted(found, key=lambda cell: cell.cost):
        tuning = protocol.tunings[cell.method]
        label = f"{_label(tuning.title, tuning.knob, cell.size, cell.classifier)}, {share(cell.ratio)}"
        entries = [Entry(f"{cell.samples:,}"), Entry(f"{cell.trained:,}"), Entry(f"{cell.cost:.3g}"), _entry(cell)]
        table.rows.append((label, entries))
    table.notes.append(_NO_NUMBERS)
    return table


def over_training(lines: Sequence[Line], method: str, protocol: Protocol, schedule: Schedule, corpus: str) -> Layout:
    """A method's validation scores as it trained, for every setting and seed.

    Args:
        lines: of the curves of one corpus.
        method: whose.
    """
    tuning = protocol.tunings[method]
    own = [line for line in lines if line["method"] == method and line["val_score"]]
    places = sorted({_place(line) for line in own})
    unit = "step" if any(line["step"] for line in own) else "epoch"
    table = Layout(
        f"{schedule.title} on validation by {unit}, {tuning.title}, {corpus}",
        ("setting", *(str(place) for place in places)),
        best_of="row",
    )
    runs: dict[str, dict[int, float]] = {}
    for line in own:
        label = _label(tuning.title, tuning.knob, int(line["size"]), line["classifier"] == "yes")
        label += f", {share(float(line['ratio']))}, seed {line['seed']}"
        runs.setdefault(label, {})[_place(line)] = 100 * float(line["val_score"])
    for label, scores in runs.items():
        entries = [Entry(f"{scores[place]:.1f}", scores[place]) if place in scores else Entry() for place in places]
        table.rows.append((label, entries))
    table.notes.append(_NO_NUMBERS)
    return table


def lost(runs: Sequence[Line], protocol: Protocol) -> str:
    """Which of the final runs have no part in the numbers, as a sentence; "" where none diverged.

    Args:
        runs: the final runs of one corpus.
    """
    counts: dict[str, list[int]] = {}
    for line in runs:
        tuning = protocol.tunings[line["method"]]
        label = _label(tuning.title, tuning.knob, int(line["size"]), line["classifier"] == "yes")
        count = counts.setdefault(f"{label}, {share(float(line['ratio']))}", [0, 0])
        count[0] += diverged(line)
        count[1] += 1
    said = [f"{label} ({some} of {total})" for label, (some, total) in counts.items() if some]
    return f"Runs whose loss was not finite are left out: {'; '.join(said)}." if said else ""


def _place(line: Line) -> int:
    return int(line["step"] or line["epoch"])


def _label(title: str, knob: str, size: int | None, classifier: bool) -> str:
    return f"{title}{f', {knob} {size}' if knob else ''}{' and classifier' if classifier else ''}"


def _entry(cell: Cell | None) -> Entry:
    if cell is None:
        return Entry()
    spread = f" ± {cell.spread:.1f}" if len(cell.scores) > 1 else ""
    return Entry(f"{cell.mean:.1f}{spread}", cell.mean)
