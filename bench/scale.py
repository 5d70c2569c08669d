"""ZeRO stages on two CPU ranks: the same training as in one process, and the memory of a step at stage 3.

    python -m bench.scale [--parts parity peak resume] [--only WORD] [--tiny] [--out FILE]

parity   twenty steps in fp32, dropout off, at the same global batch: ViT-B with VPT, mPLUG-base with LoRA and prefix,
         at stages 1, 2 and 3, against one process without ZeRO
resume   a run begun in one process goes on on two ranks at stage 3, and the other way round
peak     ViT-H/14 with VPT and with LoRA and mPLUG-large with LoRA at stage 3 in bf16: the largest memory that a rank
         has during a step, patched and plain (the same method, under DeepSpeed as it is)

A row that passed is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.record import RESULTS, Record, default_path
from bench.scale_parts import runs
from fastpeft._serve import GOES_ON, serve

PARTS = ("parity", "resume", "peak")
_CASES = (("vit", "vpt"), ("mplug", "lora"), ("mplug", "prefix"))
_PEAKS = (("vit_huge", "vpt"), ("vit_huge", "lora"), ("mplug_large", "lora"))
# Of the plain form's peak.
PEAK_BOUND = 1.02
_TINY_PEAKS = (("vit_tiny", "vpt"), ("vit_tiny", "lora"), ("mplug_tiny", "lora"))

Row = tuple[str, Callable[[], dict[str, Any]]]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 1 if a row failed."""
    parser = argparse.ArgumentParser(prog="bench.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--only", default="", metavar="WORD", help="rows that have this in their name")
    parser.add_argument("--tiny", action="store_true", help="models of a few blocks, to try the command; needs --out")
    parser.add_argument("--out", type=Path, help="result file; by default in bench/results, under the device's name")
    options = parser.parse_args(arguments)
    if options.tiny and options.out is None:
        parser.error("--tiny says nothing about this machine; give --out")
    return serve(lambda: _serve(options, parser), GOES_ON)


def _serve(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    path = options.out or default_path("cpu").with_name("scale.json")
    record = Record(path, "cpu")
    if any(row.get("tiny", False) != options.tiny for part in record.parts.values() for row in part.values()):
        parser.error(f"{path} holds rows in little, or this run is one; give another --out")
    failed = 0
    with tempfile.TemporaryDirectory(prefix="fastpeft-scale-") as folder:
        rows = {"parity": _parity, "resume": _resume, "peak": _peak}
        for part in options.parts:
            for key, measure in rows[part](Path(folder), options.tiny):
                if options.only not in key or record.rows(part).get(key, {}).get("passed", False):
                    continue
                started = time.monotonic()
                try:
                    row = measure()
                except (RuntimeError, OSError) as error:
                    row = {"error": " ".join(str(error).split())[-1500:]}
                row["seconds"] = round(time.monotonic() - started, 1)
                row |= {"tiny": True} if options.tiny else {}
                record.add(part, key, row)
                failed += not row.get("passed", False)
                said = {name: value for name, value in row.items() if name not in ("losses", "patched", "plain")}
                print(f"{part} {key}: {json.dumps(said)}", flush=True)
    where = path.relative_to(RESULTS.parents[1]) if path.is_relative_to(RESULTS.parents[1]) else path
    print(f"{where}; {failed} failed")
    return 1 if failed else 0


def _parity(folder: Path, tiny: bool) -> Iterator[Row]:
    alone: dict[tuple[str, str], list[float]] = {}

    def row(kind: str, method: str, zero: int) -> dict[str, Any]:
        if (kind, method) not in alone:
            tree = runs.config(kind, method, folder, folder / f"{kind}-{method}-alone", tiny=tiny)
            alone[kind, method] = runs.losses(runs.run(tree, 1))
        tree = runs.config(kind, method, folder, folder / f"{kind}-{method}-{zero}", tiny=tiny, zero=zero)
        found = runs.run(tree, 2)
        return _compared(runs.losses(found), alone[kind, method]) | {"peak_memory_mb": found["peak_memory_mb"]}

    for kind, method in _CASES:
        for zero in (1, 2, 3):
            yield f"{kind}/{method}/zero{zero}", lambda k=kind, m=method, z=zero: row(k, m, z)


def _resume(folder: Path, tiny: bool) -> Iterator[Row]:
    def row(first: tuple[int, int], second: tuple[int, int]) -> dict[str, Any]:
        kind, method = "mplug", "lora"
        name = f"resume-{first[0]}-{first[1]}-{second[0]}-{second[1]}"
        whole = runs.config(kind, method, folder, folder / "resume-whole", tiny=tiny)
        expected = runs.losses(runs.run(whole, 1))
        tree = runs.config(kind, method, folder, folder / name, tiny=tiny, zero=first[1])
        _interrupted(tree, first[0])
        tree["train"]["zero"] = second[1]
        found = runs.run(tree, second[0], saying="resuming  after step ")
        return _compared(runs.losses(found), expected) | {"ranks": [first[0], second[0]], "zero": [first[1], second[1]]}

    for first, second in (((1, 0), (2, 3)), ((2, 3), (1, 0)), ((2, 1), (2, 3))):
        key = f"mplug/lora/{first[0]} ranks zero{first[1]} to {second[0]} ranks zero{second[1]}"
        yield key, lambda a=first, b=second: row(a, b)


def _interrupted(tree: dict[str, Any], ranks: int) -> None:
    """Run until there is a checkpoint of half the steps, and kill."""
    out = Path(tree["out"])
    path = out.with_suffix(".yaml")
    path.write_text(json.dumps(tree))
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            runs.command(path, ranks), env=runs.environment(), cwd=runs.ROOT, stdout=said, stderr=said
        )
        half = out / "checkpoints" / f"step-{runs.STEPS // 2:08d}"
        deadline = time.monotonic() + 1800
        while not half.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if process.poll() is not None:
            said.seek(0)
            raise RuntimeError(f"ended before it was interrupted: {said.read().decode(errors='replace')[-800:]}")
        runs.kill(process)


def _peak(folder: Path, tiny: bool) -> Iterator[Row]:
    def row(model: str, method: str) -> dict[str, Any]:
        found = {form: _step(folder, model, method, form) for form in ("patched", "plain")}
        peaks = {
            form: max(step["peak_mb"] for rank in ranks for step in rank["steps"]) for form, ranks in found.items()
        }
        return {
            "passed": peaks["patched"] <= PEAK_BOUND * peaks["plain"],
            "peak_mb": peaks,
            "bound": PEAK_BOUND,
            "seconds_per_step": {form: ranks[0]["steps"][-1]["seconds"] for form, ranks in found.items()},
            "parameters": found["patched"][0]["parameters"],
            "products": found["patched"][0]["products"],
            **found,
        }

    for model, method in _TINY_PEAKS if tiny else _PEAKS:
        yield f"{model}/{method}/zero3/bf16", lambda m=model, t=method: row(m, t)


def _step(folder: Path, model: str, method: str, form: str) -> list[dict[str, Any]]:
    """What both ranks saw."""
    out = folder / f"{model}-{method}-{form}"
    options = ["--model", model, "--method", method, "--form", form, "--out", str(out)]
    script = [str(runs.ROOT / "bench" / "scale_parts" / "step.py"), *options]
    runs.ended([*runs.launcher(2), *script], form, 1800)
    return [json.loads(out.with_name(f"{out.name}.{rank}.json").read_text()) for rank in range(2)]


def _compared(found: list[float], expected: list[float]) -> dict[str, Any]:
    difference = runs.largest_difference(found, expected)
    learnt = runs.learnt(expected)
    return {
        "passed": difference <= runs.BOUND and learnt >= runs.LEAST_LEARNT,
        # JSON knows no infinity.
        "largest_relative_difference": difference if math.isfinite(difference) else None,
        "bound": runs.BOUND,
        "learnt": learnt,
        "steps": len(found),
        "losses": {"two": found, "one": expected},
    }


if __name__ == "__main__":
    sys.exit(main())
