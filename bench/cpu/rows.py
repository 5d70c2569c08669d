"""The rows of the result file: what takes turns, what is counted, and how a row is measured."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.cases import token_rows
from bench.cpu import idle
from bench.cpu.floor import Floor, Step
from bench.cpu.shapes import VIT_B, VIT_H, VIT_L, VIT_S, Models, Shape
from bench.cpu.variants import Variant, step_of
from bench.memory import in_subprocess, saved_bytes
from bench.timing import interleave
from fastpeft.native.memory import pool

FLOOR = "F"
WARMUP = 1
_MOST_TURNS = 40
_TRIES = 3

MAIN = Shape(VIT_B, 16)
ONE_THREAD = Shape(VIT_B, 16, threads=1)
FP32 = Shape(VIT_B, 4, "fp32")
OTHERS = (
    Shape(VIT_B, 1),
    Shape(VIT_B, 1, threads=1),
    Shape(VIT_B, 64),
    Shape(VIT_S, 16),
    Shape(VIT_L, 8),
    Shape(VIT_H, 4),
)

# What takes turns in a row, by the row's name; F beside it where its name is there.
GROUPS: dict[str, tuple[str, ...]] = {
    "own": (
        FLOOR,
        "timm vpt-1",
        "ours vpt-1",
        "ours vpt-200",
        "ours vpt-200-batch-mask",
        "ours vpt-200-sample-mask",
        "ours lora",
    ),
    "vpt-1": (FLOOR, "ours vpt-1", "literal vpt-1"),
    "vpt-200": ("ours vpt-200", "literal vpt-200"),
    "lora": ("ours lora", "peft lora", "peft-cast lora"),
    "serial": ("ours serial", "literal serial"),
    "parallel": ("ours parallel", "literal parallel"),
    "full": ("ours full", "timm full"),
    "inference": ("ours inference", "timm inference"),
    "memory": ("ours vpt-1", "balanced vpt-1", "small vpt-1"),
}
_PROMPTS_AND_LORA = ("vpt-1", "vpt-200", "lora")
_PEERS = (*_PROMPTS_AND_LORA, "serial", "parallel", "full", "inference")
# Which rows a shape has.
TIMED: tuple[tuple[Shape, tuple[str, ...]], ...] = (
    (MAIN, tuple(GROUPS)),
    (ONE_THREAD, ("own", *_PEERS)),
    (FP32, _PEERS),
    *((shape, _PROMPTS_AND_LORA) for shape in OTHERS),
)
# Variants whose saved bytes are counted, and whose peak memory is measured.
SAVED = tuple(
    Variant(who, method)
    for method, peer in (("vpt-1", "literal"), ("vpt-200", "literal"), ("lora", "peft"))
    for who in ("fast", "balanced", "small", peer)
)


@dataclass
class Settings:
    """How rows are measured.

    Attributes:
        tiny: in little, to try the program out; not a measurement.
        turns: of each variant; by `seconds` if None.
        seconds: after which no further round of a row begins; there are three at least.
        wait: seconds to wait for others to be idle.
        busy: measure although others compute; what they use is noted.
    """

    tiny: bool = False
    turns: int | None = None
    seconds: float = 30.0
    wait: float = 60.0
    busy: bool = False


class Clock:
    """A step after one of its own kind that notes how long it takes.

    In training a step follows on one like it. After the others' turns the caches are theirs, and memory that was given
    back has gone back to the system, on a virtual machine to its host even: the first step pays for both.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self.seconds: list[float] = []

    def __call__(self) -> None:
        """Take two steps, the second by the clock."""
        self._step()
        begin = time.perf_counter()
        self._step()
        self.seconds.append(time.perf_counter() - begin)


@contextlib.contextmanager
def threads(shape: Any) -> Iterator[None]:
    """As many threads as a shape's `threads` says, in a `with` block; if it is `tiny` one, for tests side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if shape.tiny else shape.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rows(settings: Settings, models: Models) -> Iterator[tuple[str, str, Callable[[], dict[str, object]]]]:
    """Part, key and function of all rows."""
    for shape, groups in TIMED:
        shape = little(shape, settings)
        for group in groups:
            yield "steps", f"{shape}/{group}", lambda s=shape, g=group: timed(s, GROUPS[g], settings, models)
    shape = little(MAIN, settings)
    for variant in SAVED:
        yield "saved", f"{shape}/{variant}", lambda v=variant: saved(shape, v, models)
    for variant in SAVED:
        yield "peak", f"{shape}/{variant}", lambda v=variant: peak(shape, v)


def little(shape: Shape, settings: Settings) -> Shape:
    """The shape, or what stands for it in little."""
    return Shape(shape.model, shape.batch, shape.dtype, shape.threads, settings.tiny)


def timed(shape: Shape, group: Sequence[str], settings: Settings, models: Models) -> dict[str, object]:
    """A row of variants that take turns.

    Raises:
        BusyError: others computed meanwhile.
    """
    with threads(shape):
        try:
            return _timed(shape, group, settings, models)
        finally:
            release()


def release() -> None:
    """Give the memory of a row back."""
    gc.collect()
    pool.clear()


def _timed(shape: Shape, group: Sequence[str], settings: Settings, models: Models) -> dict[str, object]:
    steps: dict[str, Step] = {}
    row = described(shape)
    if not settings.tiny:
        quiet(settings)  # what is chosen for F is measured too
    for name in group:
        if name != FLOOR:
            steps[name] = step_of(Variant.of(name), shape, models)
        elif shape.dtype == "bf16":
            plain = models.copy(shape)
            steps[name] = floor = Floor(plain, token_rows(plain, shape.images))
            row["floor"] = {"choices": floor.choices, "operations": floor.operations}
    return row | in_turns(steps, settings)


def in_turns(steps: Mapping[str, Step], settings: Settings) -> dict[str, object]:
    """Steps that take turns while nobody else computes: times by variant, and what others used.

    Raises:
        BusyError: others computed meanwhile.
    """
    for _ in range(_TRIES):
        before = None if settings.tiny else quiet(settings)
        clocks = {name: Clock(step) for name, step in steps.items()}
        others = idle.Others()
        turns = settings.turns or _MOST_TURNS
        interleave(clocks, turns=turns, warmup=WARMUP, budget=settings.seconds)
        during = others.cores()
        after = None if settings.tiny else idle.load()
        if settings.tiny or settings.busy or all((used or 0.0) <= idle.ALLOWED for used in (during, after)):
            return {
                "others_cores": {"before": before, "during": during, "after": after},
                "variants": {name: summary(clock.seconds[WARMUP:]) for name, clock in clocks.items()},
            }
    raise idle.BusyError(f"other processes used {max(during, after):.2f} cores during or after the row")


def quiet(settings: Settings) -> float | None:
    """Wait until others are idle, if the settings want that; what they use.

    Raises:
        BusyError: they were never.
    """
    return idle.load() if settings.busy else idle.wait(settings.wait)


def described(shape: Shape) -> dict[str, object]:
    """What a row is about."""
    words = {"model": shape.model, "image_size": shape.image_size, "batch": shape.images, "dtype": shape.dtype}
    return {**words, "threads": shape.threads, **({"tiny": True} if shape.tiny else {})}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def summary(seconds: Sequence[float]) -> dict[str, object]:
    """Median and quartiles in milliseconds, and every turn."""
    turns = [1000 * value for value in seconds]
    low, middle, high = quartiles(turns)
    return {
        "median_ms": middle,
        "p25_ms": low,
        "p75_ms": high,
        "turns_ms": [round(value, 3) for value in turns],
    }


def saved(shape: Shape, variant: Variant, models: Models) -> dict[str, object]:
    """Bytes that a training step keeps for its backward pass, for each token, number of its width, and block.

    Everything that is kept counts, also before and behind the blocks, but for parameters and what is packed from them.
    """
    with threads(shape):
        try:
            step = step_of(variant, shape, models)
            kept = saved_bytes(lambda: step.model(step.images), step.model)
            plain = models.copy(shape)
            count = token_rows(plain, shape.images) * plain.embed_dim * len(plain.blocks)
            return {**described(shape), "saved_bytes": kept, "bytes_per_number": kept / count}
        finally:
            release()


def peak(shape: Shape, variant: Variant) -> dict[str, object]:
    """Peak memory of three training steps beyond that of the loaded model and batch, in a process of their own."""
    return {**described(shape), **in_subprocess("bench.cpu.peak", str(variant), *arguments(shape))}


def arguments(shape: Shape) -> list[str]:
    """A shape on a command line."""
    tiny = ["--tiny"] if shape.tiny else []
    return [
        "--model",
        shape.model,
        "--batch",
        str(shape.batch),
        "--dtype",
        shape.dtype,
        "--threads",
        str(shape.threads),
        *tiny,
    ]


def ratios(row: Mapping, over: str, under: str) -> tuple[float, float, float] | None:
    """Ratio of the medians of two variants of a row, with the quartiles of the ratios of its rounds."""
    variants = row.get("variants", {})
    if not {over, under} <= variants.keys():
        return None
    pairs = zip(variants[over]["turns_ms"], variants[under]["turns_ms"], strict=True)
    low, _, high = quartiles([a / b for a, b in pairs])
    return variants[over]["median_ms"] / variants[under]["median_ms"], low, high
