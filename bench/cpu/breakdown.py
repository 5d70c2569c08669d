"""Where the time of a step goes: every native call, beside the least time that its operations and bytes take.

The native functions are watched by name wherever the library refers to them. What a call needs at the least is counted
from its arguments: products of what is multiplied, and every operand moved once. The rates of the floor are those of
the largest product and of the largest copy that this process sees; an operand that is in the cache can beat the latter.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.cpu import idle
from bench.cpu.rows import MAIN, Settings, described, little, release, threads
from bench.cpu.shapes import Models, Shape
from bench.cpu.tables import text
from bench.cpu.variants import Variant, step_of
from fastpeft.native import attention, blocked, factors, gemm, layer_norm

VARIANTS = tuple(Variant("ours", method) for method in ("vpt-1", "vpt-200", "vpt-200-sample-mask", "lora"))
_STEPS, _WARMUP = 12, 3
_NATIVE = "fastpeft.native"
# Rows and width of a product whose operands stay in two cores' caches.
_WARM = (832, 768)


@dataclass(frozen=True)
class Work:
    """A call: its kind, and what it needs at the least."""

    label: str
    operations: float
    bytes: float


def _bytes(*tensors: Tensor | None) -> int:
    return sum(0 if t is None else t.nbytes for t in tensors)


def _gemm(given: Mapping[str, Any]) -> Work:
    weight, rows = given["weight"], given["rows"]
    extra, down = given.get("extra"), given.get("down")
    kept, statistic = given.get("kept"), given.get("statistics")
    parts = [f"product {weight.depth} -> {weight.columns}"]
    if statistic is not None:
        parts[0] = f"layer norm, {parts[0]}"
    if given.get("activation"):
        parts.append(given["activation"] + (", derivative kept" if kept is not None else ""))
    elif kept is not None:
        parts.append("times derivative")
    if given.get("other") is not None:
        parts.append("residual")
    if extra is not None:
        parts.append(f"rank {extra.depth}")
    operations = 2.0 * rows * weight.columns * (weight.depth + (0 if extra is None else extra.depth))
    operations += 0 if down is None else 2.0 * rows * down.columns * weight.depth
    ways = [given[name] for name in ("a", "c", "other", "kept", "a2", "bias", "statistics") if name in given]
    packs = [w.data for w in (weight, extra, down) if w is not None]
    return Work(", ".join(parts), operations, _bytes(*ways, *packs))


def _scores(shape: attention.Shape) -> float:
    """Numbers of the score matrices."""
    return float(shape.batch) * shape.heads * shape.queries * (shape.tokens + shape.prompts)


def _rows(shape: attention.Shape) -> tuple[float, float]:
    """Bytes of the queries, and of the keys and values with the prompts'."""
    each = 2.0 * shape.heads * shape.dim
    return each * shape.batch * shape.queries, 2 * each * (shape.batch * shape.tokens + shape.prompts)


def _attention_forward(given: Mapping[str, Any]) -> Work:
    shape = given["shape"]
    queries, others = _rows(shape)
    return Work(f"attention, {shape.prompts} prompts", 4 * _scores(shape) * shape.dim, 2 * queries + others)


def _attention_backward(given: Mapping[str, Any]) -> Work:
    shape = given["shape"]
    queries, others = _rows(shape)
    # Queries, their gradient, the result and its gradient; keys and values, and theirs.
    return Work(
        f"attention backward, {shape.prompts} prompts", 10 * _scores(shape) * shape.dim, 4 * queries + 2 * others
    )


def _layer_norm_backward(given: Mapping[str, Any]) -> Work:
    return Work("layer norm backward", 0.0, _bytes(*(given[name] for name in ("dxhat", "x", "dsum", "dx"))))


def _factors(given: Mapping[str, Any]) -> Work:
    left, right, rows = given["left"], given["right"], given["rows"]
    width = left.shape[1] * blocked.BLOCK
    columns = right.shape[1] * (blocked.BLOCK if right.dim() == 4 else 1)
    moved = _bytes(left, right) + 4 * width * columns
    return Work(f"gradient of a factor, {width} x {columns}", 2.0 * rows * width * columns, moved)


def _pack(given: Mapping[str, Any]) -> Work:
    w = given["w"]
    return Work("packing", 0.0, w.nbytes + 2 * w.numel())


_WATCHED: dict[Callable, Callable[[Mapping[str, Any]], Work]] = {
    gemm.gemm: _gemm,
    gemm.pack: _pack,
    attention.attention_forward: _attention_forward,
    attention.attention_backward: _attention_backward,
    layer_norm.layer_norm_backward: _layer_norm_backward,
    factors.factors: _factors,
}


class Watch:
    """Times of calls, by kind.

    Attributes:
        calls: since the last `taken`, each with its seconds.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Work, float]] = []

    def taken(self) -> dict[str, dict[str, float]]:
        """Sums over the calls of each kind, which are forgotten."""
        sums: dict[str, dict[str, float]] = {}
        for work, seconds in self.calls:
            kind = sums.setdefault(work.label, {"calls": 0, "ms": 0.0, "operations": 0.0, "bytes": 0.0})
            kind["calls"] += 1
            kind["ms"] += 1000 * seconds
            kind["operations"] += work.operations
            kind["bytes"] += work.bytes
        self.calls = []
        return sums

    def wrapped(self, function: Callable, describe: Callable[[Mapping[str, Any]], Work]) -> Callable:
        """The function with a clock around it."""
        signature = inspect.signature(function)

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            seconds = time.perf_counter() - begin
            self.calls.append((describe(signature.bind(*args, **kwargs).arguments), seconds))
            return result

        return run


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """Watch the native functions in a `with` block, wherever a module of the library holds them."""
    watch = Watch()
    replaced = []
    for name, module in list(sys.modules.items()):
        if module is None or not (name == _NATIVE or name.startswith(f"{_NATIVE}.")):
            continue
        for attribute, value in list(vars(module).items()):
            if inspect.isfunction(value) and value in _WATCHED:
                replaced.append((module, attribute, value))
                setattr(module, attribute, watch.wrapped(value, _WATCHED[value]))
    try:
        yield watch
    finally:
        for module, attribute, value in replaced:
            setattr(module, attribute, value)


def breakdown_rows(settings: Settings, models: Models) -> Iterator[tuple[str, str, Callable[[], dict[str, object]]]]:
    """Part, key and function of a row for each method."""
    shape = little(MAIN, settings)
    for variant in VARIANTS:
        yield "breakdown", f"{shape}/{variant}", lambda v=variant: broken_down(shape, v, settings, models)


def broken_down(shape: Shape, variant: Variant, settings: Settings, models: Models) -> dict[str, object]:
    """A row: medians over steps of the time of every kind of call, and of the step.

    Raises:
        BusyError: others compute on this machine.
    """
    with threads(shape):
        try:
            return _broken_down(shape, variant, settings, models)
        finally:
            release()


def _broken_down(shape: Shape, variant: Variant, settings: Settings, models: Models) -> dict[str, object]:
    step = step_of(variant, shape, models)
    if not (settings.tiny or settings.busy):
        idle.wait(settings.wait)
    for _ in range(_WARMUP):
        step()
    rates = ceilings(settings.tiny)
    others = idle.Others()
    taken: list[dict[str, dict[str, float]]] = []
    totals: list[float] = []
    with watching() as watch, _around(watch, step.model.patch_embed, "forward", "patch embedding"):
        with _around(watch, step.optimizer, "step", "optimizer"):
            for _ in range(settings.turns or _STEPS):
                begin = time.perf_counter()
                step()
                totals.append(time.perf_counter() - begin)
                taken.append(watch.taken())
    calls = [
        {"label": label, **sums, "ms": statistics.median(seen[label]["ms"] for seen in taken)}
        for label, sums in taken[-1].items()
    ]
    return {
        **described(shape),
        "others_cores": {"during": others.cores()},
        "step_ms": 1000 * statistics.median(totals),
        "ceilings": rates,
        "calls": sorted(calls, key=lambda call: -call["ms"]),
    }


@contextlib.contextmanager
def _around(watch: Watch, thing: Any, name: str, label: str) -> Iterator[None]:
    """Time a method of one object."""
    method = getattr(thing, name)
    setattr(thing, name, watch.wrapped(method, lambda given: Work(label, 0.0, 0.0)))
    try:
        yield
    finally:
        delattr(thing, name)


@torch.no_grad()
def ceilings(tiny: bool = False) -> dict[str, float]:
    """Operations a second of the fastest product, by torch or natively on warm blocks; bytes of a large copy."""
    turns, size = (2, 256) if tiny else (20, 2048)
    a, b = (torch.randn(size, size).to(torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    products = [(2.0 * size**3, lambda: torch.mm(a, b, out=c))]
    if gemm._native.cpu_level() == "amx":
        rows, width = min(size, _WARM[0]), min(size, _WARM[1])
        weight = gemm.pack(torch.randn(width, width))
        x, y = blocked.from_rows(a[:rows, :width]), blocked.empty(rows, width)
        products.append((2.0 * rows * width**2, lambda: gemm.gemm(x, weight, y, rows)))
    source = torch.ones((1 if tiny else 64) << 20, dtype=torch.uint8)
    target = torch.empty_like(source)
    return {
        "operations": max(work / _least(product, turns) for work, product in products),
        "bytes": 2 * source.nbytes / _least(lambda: target.copy_(source), turns),
    }


def _least(function: Callable[[], object], turns: int) -> float:
    seconds = []
    for _ in range(turns):
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


HEADING = ("call", "calls", "ms", "share", "TFLOP/s", "GB/s", "floor ms", "of floor")


def breakdown_lines(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A line a kind of call, then the rest, then the step.

    The rest is torch and Python: prompts, the class token in the last block, head, loss, autograd.
    """
    rates, step = row["ceilings"], row["step_ms"]
    found, watched, floors = [], 0.0, 0.0
    for call in row["calls"]:
        watched += call["ms"]
        seconds = call["ms"] / 1000
        operations, moved = call["operations"], call["bytes"]
        floor = 1000 * max(operations / rates["operations"], moved / rates["bytes"])
        floors += floor
        found.append(
            (
                call["label"],
                str(call["calls"]),
                f"{call['ms']:.2f}",
                f"{call['ms'] / step:.1%}",
                f"{operations / seconds / 1e12:.2f}" if operations else "",
                f"{moved / seconds / 1e9:.1f}" if moved else "",
                f"{floor:.2f}" if floor else "",
                f"{call['ms'] / floor:.2f}x" if floor else "",
            )
        )
    rest = step - watched
    found.append(("the rest", "", f"{rest:.2f}", f"{rest / step:.1%}", "", "", "", ""))
    found.append(("step", "", f"{step:.2f}", "", "", "", f"{floors:.2f}", f"{step / floors:.2f}x" if floors else ""))
    return found


def breakdown_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """All rows that there are."""
    tables = []
    for key, row in rows.items():
        if "calls" in row:
            rates = f"{row['ceilings']['operations'] / 1e12:.2f} TFLOP/s, {row['ceilings']['bytes'] / 1e9:.0f} GB/s"
            tables.append(f"{key}, ms a step; floors at {rates}\n{text(HEADING, breakdown_lines(row))}\n")
    return "\n".join(tables)
