"""Part `ops`: how long operators take, beside everything else that computes the same, and beside the ceilings.

A row is a problem of a training step's size. Each way to compute it is checked against float64 first, then all take
turns; "forward" keeps what the backward pass needs, "both" runs that pass as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import torch

from bench.device_parts import proof
from bench.device_parts.ceilings import measure, of_record, shares
from bench.device_parts.operators import Builder, Rival, cases, each, function_of, implementations, why_not
from bench.device_parts.problems import Problem
from bench.device_parts.rows import Results, Row, collect, describe, outcome
from bench.device_parts.settings import DTYPES, Settings
from bench.device_parts.stopwatch import device_times
from bench.timing import Step

# What a rival with factors of its own still has gradients of.
_ACTIVATIONS = ("x", "residual", "branch", "q", "k", "v")
_SECONDS = 4.0


def rows(settings: Settings) -> Iterator[Row]:
    """One row a problem, in the format of timed steps."""
    for operator, case, builder in each("timed", settings.operators, settings.tiny):
        key = f"{operator}/{settings.dtype}/{case}"
        yield key, lambda o=operator, b=builder: _row(settings, o, b)


def _row(settings: Settings, operator: str, builder: Builder) -> dict[str, object]:
    seed = int.from_bytes(os.urandom(4), "little") if settings.seed is None else settings.seed
    torch.manual_seed(seed)
    dtype = DTYPES[settings.dtype]
    ceilings = measure(settings.device, dtype, settings.tiny)
    problem = builder(dtype, settings.device)
    rivals = {"reference": Rival(problem.by("reference"))}
    variants: dict[str, dict] = {}
    for name in implementations(operator, settings.device):
        reason = why_not(operator, name, dtype, settings.device)
        if reason is None:
            rivals[name] = Rival(function_of(operator, name, problem))
        else:
            variants[name] = {"unavailable": reason}
    refused = outcome(lambda: rivals.update(cases(operator).rivals(problem)) or {}, trace=True)
    if refused:
        variants["rivals"] = refused
    steps: dict[str, dict[str, Step]] = {"forward": {}, "both": {}}
    for name, rival in rivals.items():
        variants[name] = outcome(lambda rival=rival: _prepare(problem, rival), trace=True)
        collect()
        if not {"error", "unavailable"} & variants[name].keys():
            for phase, step in _steps(problem, rival).items():
                steps[phase][name] = step
    for phase, callables in steps.items():
        timings = device_times(callables, settings.device, settings.turns, _SECONDS if not settings.tiny else 1.0)
        for name, timing in timings.items():
            variants[name][phase] = timing.to_dict() | shares(*problem.work.of(phase), timing.median, ceilings)
    operations, size = problem.work.of("both")
    return {
        "seed": seed,
        "ceilings": ceilings.to_dict(),
        "operations": {"forward": problem.work.forward_flops, "both": operations},
        "bytes": {"forward": problem.work.forward_bytes, "both": size},
        "variants": variants,
    }


def _prepare(problem: Problem, rival: Rival) -> dict[str, object]:
    """Run it once, and check it if it computes the same function; may be refused or fail."""
    for step in _steps(problem, rival).values():
        step()
    found: dict[str, object] = {"floor": True} if rival.floor else {}
    if rival.comparable and rival.parameters is None:
        found |= problem.check(rival.function).row(deterministic=False)
    return found


def _steps(problem: Problem, rival: Rival) -> dict[str, Step]:
    leaves = problem.leaves()
    if rival.parameters is None:
        inputs = [leaves[name] for name in problem.wanted]
    else:
        inputs = [leaves[name] for name in problem.wanted if name in _ACTIVATIONS] + list(rival.parameters)

    def both() -> None:
        outputs = rival.function(leaves)
        torch.autograd.grad(outputs, inputs, problem.gradients_of(outputs), allow_unused=True)

    return {"forward": lambda: rival.function(leaves), "both": both}


def table(rows: Mapping[str, Mapping], results: Results) -> str:
    """One line a way to compute a problem, forward and backward together, and what can be added to the proven ones."""
    heading = f"{'':<30} {'forward ms':>11} {'both ms':>9} {'reference':>9} {'GB/s':>7} {'TFLOP/s':>8}"
    lines = [of_record(rows), f"{heading}  of ceilings: products, memory"]
    for key, row in rows.items():
        lines.append(key if "variants" in row else f"{key}: {describe(row)}")
        variants = row.get("variants", {})
        reference = variants.get("reference", {}).get("both")
        for name, variant in variants.items():
            if "both" not in variant:
                lines.append(f"  {name:<28} {describe(variant)}")
                continue
            both = variant["both"]
            ratio = f"{reference['median_ms'] / both['median_ms']:.2f}x" if reference else ""
            verdict = "  WRONG" if variant.get("passed") is False else "  leaves work out" if "floor" in variant else ""
            lines.append(
                f"  {name:<28} {variant['forward']['median_ms']:11.4f} {both['median_ms']:9.4f} {ratio:>9} "
                f"{both['gbs']:7.0f} {both['tflops']:8.1f}  {both['of_gemm_ceiling']:.2f}, "
                f"{both['of_memory_ceiling']:.2f}{verdict}"
            )
    return "\n".join([*lines, "", *proof.lines(results)])
