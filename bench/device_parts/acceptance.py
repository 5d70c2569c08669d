"""What the project wants to reach on a GPU, beside what results say: a figure, or "not measured"."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from bench.device_parts.rows import Results
from bench.device_parts.settings import VIT_B, VIT_H

# Key of the row in which the library's own steps take turns.
OWN = "own"
_MISSING = "not measured"
_OURS = ("triton-graph", "triton", "reference-graph", "reference")


@dataclass(frozen=True)
class _Goal:
    """A line of the table.

    Attributes:
        what: in words.
        least, aim: as the project's goals have them.
        found: the figure, in words.
    """

    what: str
    least: str
    aim: str
    found: Callable[[Results], str]


def table(results: Results) -> str:
    """The goals in a table, each figure with the variant of ours that it is of."""
    goals = [(goal.what, goal.least, goal.aim, goal.found(results)) for goal in _GOALS]
    heading = ("goal, ViT-B/16 at batch 64", "at least", "aim", "measured")
    widths = [max(len(line[column]) for line in (heading, *goals)) for column in range(4)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in (heading, *goals)
    ]
    return "\n".join([*(line.rstrip() for line in lines), _gate(results)])


def _gate(results: Results) -> str:
    """Whether what is fast is right as well."""
    if results.chip is None:
        return "run in little: none of these figures says anything"
    rows = results.rows("verify").values()
    right, wrong = (sum(row.get("passed") is verdict for row in rows) for verdict in (True, False))
    errors = sum("error" in row for row in rows)
    if not rows:
        return "verify: not run, so none of this is known to be right"
    return f"verify: {right} rows right, {wrong} wrong, {errors} failed"


def _variants(results: Results, part: str, kind: str, method: str, model: str = VIT_B) -> Mapping[str, Mapping]:
    """Variants of a row at batch 64 in bf16, or in little of the only one there is."""
    if results.chip is not None and results.chip[0] != "cuda":
        return {}
    for key, row in results.rows(part).items():
        name, *_, found_kind, found_method = key.split("/")
        batch = key.split("/")[1]
        if (found_kind, found_method) != (kind, method) or not name.startswith(model):
            continue
        if (batch == "b64" and "bfloat16" in key) or results.chip is None:
            return row.get("variants", {})
    return {}


def _best(variants: Mapping[str, Mapping], suffixes: tuple[str, ...] = _OURS, before: str = "") -> str | None:
    """The fastest of ours that was timed."""
    timed = [f"{before}{name}" for name in suffixes if "median_ms" in variants.get(f"{before}{name}", {})]
    return min(timed, key=lambda name: variants[name]["median_ms"], default=None)


def _ratio(over: Mapping, under: Mapping, figure: str) -> float | None:
    return over[figure] / under[figure] if figure in over and under.get(figure) else None


def _against(method: str, eager: str) -> Callable[[Results], str]:
    """Speed-up over and memory share of eager and compiled code."""

    def found(results: Results) -> str:
        return "; ".join(
            [
                _beside(_variants(results, "steps", "train", method), eager),
                _beside(_variants(results, "compiled", "train", method), f"{eager}-compiled"),
            ]
        )

    return found


def _beside(variants: Mapping[str, Mapping], theirs: str) -> str:
    best, peer = _best(variants), variants.get(theirs, {})
    if best is None or "median_ms" not in peer:
        return f"{theirs}: {_MISSING}"
    words = f"{theirs}: {peer['median_ms'] / variants[best]['median_ms']:.2f}x as fast"
    for figure in ("total_bytes", "reserved_bytes"):
        share = _ratio(variants[best], peer, figure)
        if share is not None:
            return f"{words}, {share:.2f}x {figure.partition('_')[0]} memory ({best})"
    return f"{words}, memory {_MISSING} ({best})"


def _own(method: str) -> Callable[[Results], str]:
    """Time of a method over that of one prompt."""

    def found(results: Results) -> str:
        variants = _variants(results, "steps", "train", OWN)
        words = []
        for variant in _OURS:
            names = (f"{method} {variant}", f"vpt-deep-1 {variant}")
            share = _ratio(*(variants.get(name, {}) for name in names), "median_ms")
            words += [] if share is None else [f"{share:.2f}x ({variant})"]
        return ", ".join(words) or _MISSING

    return found


def _ceiling(results: Results) -> str:
    words = []
    for method in ("full", "vpt-deep-200-batch-mask", "lora-qkv-8"):
        variants = _variants(results, "steps", "train", method, VIT_H)
        best = _best(variants)
        if best is not None and "of_gemm_ceiling" in variants[best]:
            words.append(f"{method} {variants[best]['of_gemm_ceiling']:.2f} ({best})")
    return ", ".join(words) or _MISSING


def _deployed(results: Results) -> str:
    variants = _variants(results, "compiled", "inference", "vpt-deep-200")
    best = _best(variants, ("triton-merged", "reference-merged"))
    share = None if best is None else _ratio(variants[best], variants.get("plain-compiled", {}), "median_ms")
    return _MISSING if share is None else f"{share:.2f}x ({best})"


def _goals() -> Iterator[_Goal]:
    deep = "vpt-deep-200-batch-mask"
    yield _Goal(
        "VPT-Deep p=200, batch mask, against literal eager / compiled",
        "3x / 2x faster, memory 0.35x",
        "4.5x / 3x, 0.2x",
        _against(deep, "literal"),
    )
    yield _Goal("VPT-Deep p=200, batch mask, against own p=1", "1.2x", "1.08x", _own(deep))
    yield _Goal(
        "LoRA r=8 on q,k,v against peft eager / compiled",
        "2x / 1.4x, memory 0.6x",
        "2.5x / 1.7x, 0.4x",
        _against("lora-qkv-8", "peft"),
    )
    yield _Goal("LoRA against own VPT p=1", "1.08x", "1.03x", _own("lora-qkv-8"))
    yield _Goal(
        "Adapter 64 against unfused eager / compiled", "2x / 1.4x", "2.5x / 1.7x", _against("adapter-64", "literal")
    )
    yield _Goal("Fraction of the measured GEMM ceiling, ViT-H/14 step", "0.65", "0.8", _ceiling)
    yield _Goal("Inference p=200 merged against the plain model under torch.compile", "1.05x", "0.9x", _deployed)


_GOALS = tuple(_goals())
