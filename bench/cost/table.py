"""The cost table as text: a block a row, a line an implementation, the paper's A100 beside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.cost import operators
from bench.cost.accuracy import Accuracies
from bench.cost.measure import EAGER
from bench.cost.methods import INFERENCE, PHASES, TRAIN
from bench.cost.selection import Row

Record = Mapping[str, Any]
EMPTY = "-"
_MIB = 1 << 20
_PAPER = ("tuned_over_total", "train_latency", "train_peak_memory", "test_latency", "test_peak_memory")
_HEADING = (
    ("", "", "train", "", "", "", "", "", "inference", "", "", "", "", "", "", "A100", "", "", "", ""),
    (
        "row", "by",
        "ms/img", "ms/batch", "x F", "x base", "peak MiB", "saved MiB",
        "ms/img", "ms/batch", "x F", "x base", "peak MiB",
        "acc %", "tuned %",
        "tuned %", "train ms", "GB", "test ms", "GB",
    ),
)  # fmt: skip
# Which columns a gap precedes.
_GAPS = (2, 8, 13, 15)


def render(rows: Iterable[Row], records: Iterable[Record], accuracies: Accuracies) -> str:
    """The table.

    Args:
        rows: in their order; what no record is about has dashes.
        records: what benchmarks noted, one an implementation, mode and phase.
        accuracies: of the methods.
    """
    records = list(records)
    lines, reasons = [list(line) for line in _HEADING], {}
    for row in rows:
        own = {(r["phase"], r["who"], r["mode"]): r for r in records if r["row"] == row.name}
        lines += _block(row, own, accuracies)
        for (phase, who, mode), record in own.items():
            if (reason := why_not(record)) is not None:
                reasons.setdefault(reason, []).append(f"{row.name} {phase} by {_by(who, mode)}")
        if row.missing:
            reasons.setdefault("not in the library", []).append(row.name)
    text = [*_aligned(lines), "", *_notes(records, accuracies)]
    return "\n".join([*text, *(f"Without figures, {reason}: {', '.join(which)}." for reason, which in reasons.items())])


def why_not(record: Record) -> str | None:
    """Why a record has no figures, or None."""
    return next((str(record[key]) for key in ("error", "unavailable") if key in record), None)


def _block(row: Row, own: Mapping[tuple[str, str, str], Record], accuracies: Accuracies) -> list[list[str]]:
    floors = {
        phase: next((r["floor_ms"] for (p, _, _), r in own.items() if p == phase and "floor_ms" in r), None)
        for phase in PHASES
    }
    images = next((r["batch"] for r in own.values()), 1)
    lines = []
    if any(floors.values()):
        lines.append(["", "F", *_time(floors[TRAIN], images), *[""] * 4, *_time(floors[INFERENCE], images), *[""] * 3])
    named = dict.fromkeys((who, mode) for _, who, mode in own)
    for who, mode in named:
        train, inference = (own.get((phase, who, mode), {}) for phase in (TRAIN, INFERENCE))
        cells = ["", _by(who, mode)]
        cells += [
            *_time(train.get("median_ms"), images),
            *_ratios(train, floors[TRAIN]),
            _mib(train, "peak_bytes"),
            _mib(train, "saved_bytes"),
        ]
        cells += [
            *_time(inference.get("median_ms"), images),
            *_ratios(inference, floors[INFERENCE]),
            _mib(inference, "peak_bytes"),
        ]
        lines.append(cells)
    lines = lines or [["", EMPTY, *[EMPTY] * 11]]
    lines = [line + [""] * (len(_HEADING[1]) - len(line)) for line in lines]
    lines[0][0] = row.name
    tuned = next((r["tuned_percent"] for r in own.values() if r.get("tuned_percent") is not None), None)
    if not row.operator:
        lines[0][13:] = [_number(accuracies.of(row), ".2f"), _number(tuned, ".2f")]
        lines[0] += [EMPTY if (cell := row.paper(metric)) is None else str(cell) for metric in _PAPER]
    return lines


def _by(who: str, mode: str) -> str:
    return who if mode == EAGER else f"{who}, {mode}"


def _number(value: float | None, form: str) -> str:
    return EMPTY if value is None else format(value, form)


def _short(value: float) -> str:
    """With three figures, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _time(ms: float | None, images: int) -> list[str]:
    return [EMPTY] * 2 if ms is None else [_short(ms / images), _short(ms)]


def _ratios(record: Record, floor: float | None) -> list[str]:
    of_floor = EMPTY if floor is None or "median_ms" not in record else f"{record['median_ms'] / floor:.2f}"
    return [of_floor, _number(record.get("ratio"), ".2f")]


def _mib(record: Record, figure: str) -> str:
    return _short(record[figure] / _MIB) if figure in record else EMPTY


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Columns side by side: words to the left, numbers to the right; a heading over several begins at its first."""
    bodies = lines[1:]
    widths = [max(len(line[column]) for line in bodies) for column in range(len(lines[1]))]

    def joined(line: Sequence[str], left: int) -> str:
        cells = []
        for column, (text, width) in enumerate(zip(line, widths, strict=True)):
            cells.append(
                (" | " if column in _GAPS else "  " if column else "")
                + (text.ljust(width) if column < left else text.rjust(width))
            )
        return "".join(cells).rstrip()

    groups, over = "", lines[0]
    for column in range(len(widths)):
        gap = " | " if column in _GAPS else "  " if column else ""
        # A group's name may be longer than its first column.
        start = sum(widths[:column]) + sum(3 if c in _GAPS else 2 for c in range(1, column + 1))
        if over[column] or column in _GAPS:
            groups = groups.ljust(start - len(gap)) + gap + over[column]
    found = [groups.rstrip(), joined(lines[1], 2), "-" * max(len(joined(line, 2)) for line in bodies)]
    for number, line in enumerate(lines[2:]):
        if line[0] and number:
            found.append("")
        found.append(joined(line, 2))
    return found


def _notes(records: Sequence[Record], accuracies: Accuracies) -> list[str]:
    """What the columns mean, in lines."""
    notes = []
    if records:
        about = records[0]["settings"]
        threads = about.get("threads")
        where = "" if threads is None else f", {threads} thread{'' if threads == 1 else 's'}"
        size = f" at {about['image_size']} px" if about["image_size"] else ""
        notes.append(f"{about['model']}{size}, batch {about['batch']}, {about['dtype']}, {about['device']}{where}.")
    notes += [
        "F: the step's matrix products alone; x F: time over it; x base: time over the literal implementation's (an "
        "operator's: plain PyTorch's), eager, of the same turns.",
        "Inference: prompts and LoRA merged, where they can be. Peak: beyond weights; on a CPU of two steps in a "
        "process of their own, eager alone. Saved: for the backward pass.",
        "A100: the VPT paper's Table 12, batch 64; it prints the times as ms/img, but they fit a batch; its memory is "
        "with weights.",
    ]
    shown = [name for name in dict.fromkeys(r["row"] for r in records) if Row(name).operator]
    if shown:
        notes.append("Operators: " + "; ".join(f"{name}: {operators.describe(name)}" for name in shown) + ".")
    return notes + ([accuracies.about] if accuracies.about else [])
