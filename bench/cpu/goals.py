"""What a step should cost, beside what the result file says: a figure with its spread, or "not measured"."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from bench.cpu.rows import FLOOR, FP32, MAIN, ONE_THREAD, OTHERS, ratios
from bench.cpu.shapes import Shape

MISSING = "not measured"
# Less than this share apart is the same.
MARGIN = 0.02

Parts = Mapping[str, Mapping[str, Mapping]]


class Figure(NamedTuple):
    """A measured ratio and the quartiles of its rounds; those of a count are itself."""

    value: float
    low: float
    high: float

    def said(self, unit: str) -> str:
        """In words, with the quartiles if they differ; {} stands for a number in `unit`."""
        low, value, high = (f"{number:.2f}" for number in (self.low, self.value, self.high))
        return unit.format(value) + ("" if low == high else f" ({low}-{high})")


@dataclass(frozen=True)
class Goal:
    """A line of the table.

    Attributes:
        step: in words.
        least, aim: bounds; aim is None where there is only one.
        larger: the figure should be at least these, not at most.
        unit: behind a figure; {} stands for it.
        found: the figure that decides, or None.
        beside: what is said next to it.
    """

    step: str
    least: float
    aim: float | None
    larger: bool
    unit: str
    found: Callable[[Parts], Figure | None]
    beside: Callable[[Parts], str] = lambda parts: ""

    def line(self, parts: Parts) -> tuple[str, str, str, str, str]:
        """Step, measured, at least, aim, met."""
        figure = self.found(parts)
        measured = MISSING if figure is None else figure.said(self.unit) + self.beside(parts)
        least, aim = ("" if bound is None else self.unit.format(f"{bound:g}") for bound in (self.least, self.aim))
        return self.step, measured, least, aim, self.met(figure)

    def met(self, figure: Figure | None) -> str:
        """Whether the figure is within the bounds: "yes", "yes, the aim too", "no", or "no, by less than 2%"."""
        if figure is None:
            return ""
        if self._within(figure.value, self.aim, 0.0):
            return "yes, the aim too"
        if self._within(figure.value, self.least, 0.0):
            return "yes"
        return f"no, by less than {MARGIN:.0%}" if self._within(figure.value, self.least, MARGIN) else "no"

    def _within(self, value: float, bound: float | None, margin: float) -> bool:
        if bound is None:
            return False
        return value >= bound * (1 - margin) if self.larger else value <= bound * (1 + margin)


HEADING = ("step", "measured", "at least", "aim", "met")


def lines(parts: Parts) -> list[tuple[str, ...]]:
    """The table, without its heading."""
    return [goal.line(parts) for goal in GOALS]


def ratio(parts: Parts, shape: Shape, group: str, over: str, under: str) -> Figure | None:
    """How often `under` goes into `over`, in a row."""
    found = ratios(parts.get("steps", {}).get(f"{shape}/{group}", {}), over, under)
    return None if found is None else Figure(*found)


# Of what each method is compared with: the row, ours, the peer's.
PEERS = {
    "vpt-1": ("ours vpt-1", "literal vpt-1"),
    "vpt-200": ("ours vpt-200", "literal vpt-200"),
    "lora": ("ours lora", "peft lora"),
    "serial": ("ours serial", "literal serial"),
    "parallel": ("ours parallel", "literal parallel"),
    "full": ("ours full", "timm full"),
    "inference": ("ours inference", "timm inference"),
}


def speedup(parts: Parts, shape: Shape, group: str) -> Figure | None:
    """How many times as fast as its peer ours is."""
    ours, peer = PEERS[group]
    return ratio(parts, shape, group, peer, ours)


def _slowest(shapes: tuple[Shape, ...], groups: tuple[str, ...]) -> tuple[Callable, Callable]:
    """The worst of several speed-ups, and which it is; only when all of them are there."""

    def worst(parts: Parts) -> tuple[Figure, str] | None:
        found = {f"{shape} {group}": speedup(parts, shape, group) for shape in shapes for group in groups}
        if None in found.values():
            return None
        name = min(found, key=lambda key: found[key].value)
        return found[name], name

    def figure(parts: Parts) -> Figure | None:
        found = worst(parts)
        return None if found is None else found[0]

    def which(parts: Parts) -> str:
        found = worst(parts)
        return "" if found is None else f", the least: {found[1]}"

    return figure, which


def _own(method: str, base: str) -> Callable[[Parts], Figure | None]:
    return lambda parts: ratio(parts, MAIN, "own", f"ours {method}", base)


def _peer(group: str) -> Callable[[Parts], Figure | None]:
    return lambda parts: speedup(parts, MAIN, group)


def _timm(parts: Parts) -> str:
    found = ratio(parts, MAIN, "own", "timm vpt-1", FLOOR)
    return "" if found is None else f"; timm {found.said('{} F')}"


def _cast(parts: Parts) -> str:
    found = ratio(parts, MAIN, "lora", "peft-cast lora", "ours lora")
    return "" if found is None else f"; {found.said('{}x')} with bf16 factors in peft"


def _memory(who: str) -> Callable[[Parts], Figure | None]:
    return lambda parts: ratio(parts, MAIN, "memory", f"{who} vpt-1", "ours vpt-1")


def kept(parts: Parts, variant: str) -> Figure | None:
    """Saved bytes of a variant for each token, number of its width, and block."""
    row = parts.get("saved", {}).get(f"{MAIN}/{variant}", {})
    value = row.get("bytes_per_number")
    return None if value is None else Figure(value, value, value)


def _kept(who: str) -> tuple[Callable, Callable]:
    """The most of a memory setting over the methods, and each."""

    def all_of(parts: Parts) -> dict[str, Figure | None]:
        return {method: kept(parts, f"{who} {method}") for method in ("vpt-1", "vpt-200", "lora")}

    def most(parts: Parts) -> Figure | None:
        found = all_of(parts).values()
        return None if None in found else max(found)

    def each(parts: Parts) -> str:
        return f" ({', '.join(f'{method} {figure.value:.2f}' for method, figure in all_of(parts).items())})"

    return most, each


def _goals() -> Iterator[Goal]:
    yield Goal("VPT-Deep, 1 prompt", 1.4, 1.0, False, "{} F", _own("vpt-1", FLOOR), _timm)
    for words, method, least, aim in (
        ("no dropout", "vpt-200", 1.2, 1.1),
        ("one mask a batch", "vpt-200-batch-mask", 1.2, 1.1),
        ("a mask a sample", "vpt-200-sample-mask", 1.5, 1.35),
    ):
        step = f"VPT-Deep, 200 prompts, {words}: time over that with 1"
        yield Goal(step, least, aim, False, "{}x", _own(method, "ours vpt-1"))
    faster = "{}x"
    yield Goal("VPT-Deep, 200 prompts, no dropout: speed over literal", 4.5, 7, True, faster, _peer("vpt-200"))
    yield Goal("LoRA r=8 on q, k, v: speed over peft on qkv", 2.5, 3.5, True, faster, _peer("lora"), _cast)
    yield Goal("LoRA r=8 on q, k, v: time over own VPT p=1", 1.12, 1.04, False, "{}x", _own("lora", "ours vpt-1"))
    yield Goal("Serial adapter 64: speed over literal", 2.2, 3, True, faster, _peer("serial"))
    yield Goal("Parallel adapter 64: speed over literal", 2.2, 3, True, faster, _peer("parallel"))
    yield Goal("Full fine-tuning, patch(model): speed over timm", 1.5, 2, True, faster, _peer("full"))
    yield Goal("Inference, 200 prompts merged: speed over timm without", 1, 1.4, True, faster, _peer("inference"))
    yield Goal(
        f"fp32, batch {FP32.batch}, all of these: speed over their peers", 1, 1.3, True, faster,
        *_slowest((FP32,), tuple(PEERS)),
    )  # fmt: skip
    shapes = ((MAIN, ONE_THREAD, *OTHERS), ("vpt-1", "vpt-200", "lora"))
    yield Goal("Other models, batches and threads: speed over their peers", 1, None, True, faster, *_slowest(*shapes))
    for who, least, aim in (("fast", 20.5, 18), ("balanced", 13, 9), ("small", 3, 2)):
        yield Goal(f'Saved for backward, memory="{who}"', least, aim, False, "{} B", *_kept(who))
    for who, least, aim in (("balanced", 1.15, 1.05), ("small", 1.5, 1.4)):
        yield Goal(f'Time with memory="{who}" over that with "fast"', least, aim, False, "{}x", _memory(who))


GOALS = tuple(_goals())
