"""Steps that take turns, each with its memory, beside the unavoidable products and the chip's ceilings.

`total_bytes` is what the allocator holds at most during a step: weights, optimizer state and all that the step needs;
`peak_bytes` is that without weights and state. A recorded or compiled step keeps memory of its own that these figures
do not see, so `reserved_bytes`, what the allocator has taken from the device for a variant, is there for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from bench.cases import TrainingStep, token_rows
from bench.device_parts.ceilings import measure
from bench.device_parts.models import GraphedStep, Inference, Prepared, other, resident_bytes
from bench.device_parts.rows import collect, grouped, outcome
from bench.device_parts.settings import DTYPES, Settings, Shape
from bench.memory import cuda_peak, saved_bytes
from bench.timing import Step, Timing, floor, floor_operations, interleave

Prepare = Callable[[], TrainingStep | Inference]
# A recorded step is one from its fifth call on; what is compiled is fast from its third on.
_WARM_UP = 5


def row(settings: Settings, shape: Shape, method: str | None, prepared: Prepared, seconds: float) -> dict[str, object]:
    """Time steps in turns; one that fails or cannot be had has its reason instead.

    Args:
        settings: of the run.
        shape: of model and batch.
        method: whose unavoidable products are timed as well; None for none.
        prepared: names, and what prepares each.
        seconds: after which no further round starts.
    """
    products = None
    if method is not None:
        literal = other(settings, shape, method, "literal")
        count = token_rows(literal, shape.batch)
        products = floor(literal, count), floor_operations(literal, count)
    return beside(settings, shape.batch, products, prepared, seconds)


def beside(
    settings: Settings, batch: int, products: tuple[Step, int] | None, prepared: Prepared, seconds: float
) -> dict[str, object]:
    """Time steps in turns with the unavoidable products beside them.

    Args:
        settings: of the run.
        batch: images of a step.
        products: a step of nothing but those, and its operations; None for none.
        prepared: names, and what prepares each.
        seconds: after which no further round starts.
    """
    ceilings = measure(settings.device, DTYPES[settings.dtype], settings.tiny)
    steps: dict[str, Step] = {}
    operations = 0
    if products is not None:
        steps["floor"], operations = products
    given = dict(prepared)
    recorded = {name: given[name] for name in given if name.endswith("-graph")}
    variants = _make_ready(settings, {name: given[name] for name in given if name not in recorded}, steps)
    timings = _take_turns(settings, steps, seconds / 2 if recorded else seconds)
    if recorded:
        # A recording that fails can break what runs after it, so the others have their figures by now.
        graphs = _make_ready(settings, recorded, steps)
        together = outcome(lambda: _take_turns(settings, steps, seconds / 2), trace=True)
        failure = together if {"error", "unavailable"} & together.keys() else {}
        variants |= {name: graph | failure for name, graph in graphs.items()}
        timings = timings if failure else together
    found: dict[str, object] = {"batch": batch, "ceilings": ceilings.to_dict(), "variants": variants}
    bottom = timings.pop("floor", None)
    if bottom is not None:
        found["floor"] = bottom.to_dict() | _rate(operations, bottom, ceilings.gemm_tflops)
    for name, timing in timings.items():
        variants[name] |= timing.to_dict()
        if bottom is not None:
            variants[name] |= {"fraction_of_floor": bottom.median / timing.median}
            variants[name] |= _rate(operations, timing, ceilings.gemm_tflops)
    return found


def _make_ready(settings: Settings, prepared: Mapping[str, Prepare], steps: dict[str, Step]) -> dict[str, dict]:
    """Prepare steps, and add those that can be had; each one's memory, or why it cannot."""
    found = {}
    for name, prepare in prepared.items():
        found[name] = outcome(lambda name=name, prepare=prepare: _ready(settings, name, prepare, steps), trace=True)
        collect()
    return found


def _take_turns(settings: Settings, steps: Mapping[str, Step], seconds: float) -> dict[str, Timing]:
    return interleave(steps, device=settings.device, turns=settings.turns, warmup=1, budget=seconds)


def _rate(operations: int, timing: Timing, ceiling: float) -> dict[str, float]:
    """Rate of the unavoidable products in a step; attention's, prompts' and factors' are not counted."""
    tflops = operations / timing.median / 1e12
    return {"tflops": tflops, "of_gemm_ceiling": tflops / ceiling}


def _ready(settings: Settings, name: str, prepare: Prepare, steps: dict[str, Step]) -> dict[str, object]:
    """Prepare a step and bring it up to speed; its memory."""
    before = torch.cuda.memory_reserved(settings.device) if settings.cuda else 0
    step = prepare()
    for _ in range(_WARM_UP):
        step()
    found = _memory(settings, step, before)
    steps[name] = step
    return found


def _memory(settings: Settings, step: TrainingStep | Inference, reserved_before: int) -> dict[str, object]:
    found: dict[str, object] = {"resident_bytes": resident_bytes(step)}
    eager = not isinstance(step, GraphedStep) and not step.compiled
    if eager and isinstance(step, TrainingStep):
        found["saved_bytes"] = saved_bytes(step.forward, step.model)
    if settings.cuda:
        # What earlier steps left in the allocator would hide a part of this one's need.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(settings.device)
        step()
        torch.cuda.synchronize(settings.device)
        found["reserved_bytes"] = torch.cuda.max_memory_reserved(settings.device) - reserved_before
        if eager:
            found["peak_bytes"] = cuda_peak(step, settings.device)
            found["total_bytes"] = found["peak_bytes"] + found["resident_bytes"]
    return found


def lines(rows: Mapping[str, Mapping]) -> list[str]:
    """Results, one line a row: milliseconds, share of the products' ceiling and memory of every variant."""
    found, problems = [], {}
    for key, row in rows.items():
        if "variants" not in row:
            problems[key] = row
            continue
        cells = [f"floor {row['floor']['median_ms']:.2f} ms"] if "floor" in row else []
        for name, variant in row["variants"].items():
            cells.append(_cell(name, variant))
            if "median_ms" not in variant:
                problems[f"{key}, {name}"] = variant
        found.append(f"{key}: {' | '.join(cells)}")
    return [*found, *grouped(problems)]


def _cell(name: str, variant: Mapping) -> str:
    if "median_ms" not in variant:
        return f"{name} -"
    memory = variant.get("total_bytes", variant.get("reserved_bytes"))
    share = f", {variant['of_gemm_ceiling']:.2f} of ceiling" if "of_gemm_ceiling" in variant else ""
    return f"{name} {variant['median_ms']:.2f} ms{share}" + (f", {memory / 2**20:.0f} MiB" if memory else "")
