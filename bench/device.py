"""Checks and measures training steps on the device at hand, into one result file.

    python -m bench.device --part verify      # every method's training step against the literal implementation
    python -m bench.device --part steps       # step time and peak memory, fused, literal and peft, eager and compiled

A run stops by itself after --budget seconds; the same command run again adds the rows that are missing. Needs torch,
timm and numpy, and peft for its rows. `--device cpu --tiny` runs everything in little on any machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from bench.cases import METHODS, batch, build, create_model, has_peft, token_rows, training_step
from bench.memory import ResidentPeak, cuda_peak, in_subprocess, saved_bytes
from bench.parity import compare
from bench.record import Record, default_path
from bench.timing import floor, interleave

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CLASSES = 100
# Compiling a training step takes a minute or more, so `--compile some` compiles one row of each kind.
_COMPILED = ("full", "vpt-deep-1", "vpt-deep-200", "vpt-deep-200-batch-mask", "lora-qkv-8", "adapter-64")

# Batch normalisation of hidden units that ReLU leaves nearly always at zero magnifies the features' rounding: in
# bfloat16 the literal implementation is itself 20% off. In float64 there is something to compare with.
_ILL_CONDITIONED = {("mlp-3", "train")}


class Settings:
    """What to run on: read from the command line once, shared by all rows."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device(arguments.device)
        cuda = self.device.type == "cuda"
        self.tiny: bool = arguments.tiny
        self.model: str = arguments.model or "vit_base_patch16_224"
        self.image_size: int = arguments.image_size or (32 if self.tiny else 224)
        self.batch: int = arguments.batch or (2 if self.tiny else 64 if cuda else 8)
        self.dtype: str = arguments.dtype or ("bfloat16" if cuda else "float32")
        self.turns: int = arguments.turns or (3 if self.tiny else 20)
        self.methods: list[str] = arguments.methods.split(",") if arguments.methods else list(METHODS)
        self.compile: str = arguments.compile or ("some" if cuda else "none")
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown:
            raise SystemExit(f"--methods: no {', '.join(unknown)}; there are {', '.join(METHODS)}")

    def plain(self) -> nn.Module:
        """Create the plain float32 model on the CPU."""
        options = {"embed_dim": 256, "num_heads": 4, "depth": 2} if self.tiny else {}
        return create_model(self.model, _CLASSES, self.image_size, **options)

    def batch_of(self, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images and labels on the device."""
        return batch(count, self.image_size, _CLASSES, dtype, self.device)

    @property
    def shape(self) -> str:
        """Name the model and image size in a row's key."""
        return f"{self.model}{'-tiny' if self.tiny else ''}-{self.image_size}px"


Row = tuple[str, Callable[[], dict[str, object]]]


def verify_rows(settings: Settings) -> Iterator[Row]:
    """Yield the rows of `verify`: each method in float32 and bfloat16, in training and evaluation mode."""
    for method in settings.methods:
        for mode in ("train", "eval"):
            exact = (method, mode) in _ILL_CONDITIONED
            for dtype in ("float64",) if exact else ("float32", "bfloat16"):
                key = f"{settings.shape}/{dtype}/{mode}/{method}"
                yield key, lambda m=method, d=dtype, t=mode == "train": _verify(settings, m, getattr(torch, d), t)


def _verify(settings: Settings, method: str, dtype: torch.dtype, training: bool) -> dict[str, object]:
    model = settings.plain().to(settings.device)
    images, labels = settings.batch_of(64 if settings.tiny else 32, torch.float32)
    deviations = compare(model, METHODS[method](), images, labels, dtype=dtype, training=training)
    worst = max(deviations, key=lambda d: d.error / d.bound)
    return {
        "passed": all(d.passed for d in deviations),
        "tensors": len(deviations),
        "fused_error": worst.error,
        "literal_error": worst.baseline,
        "bound": worst.bound,
        "worst": str(worst),
        "failed": [str(d) for d in deviations if not d.passed][:10],
    }


def steps_rows(settings: Settings) -> Iterator[Row]:
    """Yield the rows of `steps`: each method eager, then those that are compiled."""
    prefix = f"{settings.shape}/b{settings.batch}/{settings.dtype}"
    for method in settings.methods:
        yield f"{prefix}/eager/{method}", lambda m=method: _step(settings, m, compiled=False)
    for method in settings.methods:
        if settings.compile == "all" or (settings.compile == "some" and method in _COMPILED):
            yield f"{prefix}/compiled/{method}", lambda m=method: _step(settings, m, compiled=True)


def _step(settings: Settings, method_name: str, compiled: bool) -> dict[str, object]:
    method, dtype = METHODS[method_name](), _DTYPES[settings.dtype]
    images, labels = settings.batch_of(settings.batch, dtype)
    names = ["fused", "literal", *(["peft"] if has_peft(method) else [])]
    steps, memory, products = {}, {}, None
    for name in names:
        model = build(name, method, settings.plain().to(settings.device, dtype))
        steps[name] = training_step(model, images, labels, compiled=compiled)
        steps[name]()
        memory[name] = _memory(settings, method_name, name, model, steps[name], images, compiled)
        if name == "literal":
            products = floor(model, token_rows(model, settings.batch))
    timings = interleave(
        {**steps, "floor": products},
        device=settings.device,
        turns=settings.turns,
        budget=60 if not settings.tiny else 5,
    )
    bottom = timings.pop("floor")
    return {
        "trained_parameters": sum(
            p.numel() for p in build("fused", method, settings.plain()).parameters() if p.requires_grad
        ),
        "floor": bottom.to_dict(),
        "variants": {
            name: {**timing.to_dict(), **memory[name], "fraction_of_floor": bottom.median / timing.median}
            for name, timing in timings.items()
        },
        "literal_over_fused": timings["literal"].median / timings["fused"].median,
    }


def _memory(
    settings: Settings,
    method: str,
    variant: str,
    model: nn.Module,
    step: Callable[[], object],
    images: torch.Tensor,
    compiled: bool,
) -> dict[str, int]:
    """Peak memory of a step beyond the weights, and what autograd keeps for backward."""
    found = {}
    if not compiled:  # a compiled graph is cut after its first run, and hooks on saved tensors would recompile it
        found["saved_bytes"] = saved_bytes(lambda: model(images), model)
    if settings.device.type == "cuda":
        found["peak_bytes"] = cuda_peak(step, settings.device)
    elif not compiled:
        arguments = ["--measure", f"{method}:{variant}", "--model", settings.model, "--dtype", settings.dtype]
        arguments += ["--batch", str(settings.batch), "--image-size", str(settings.image_size)]
        found |= in_subprocess("bench.device", "--device", "cpu", *arguments, *(["--tiny"] if settings.tiny else []))
    return found


def measure_resident(settings: Settings, what: str) -> dict[str, int]:
    """Measure, in a process of its own, the resident memory that three training steps add to the loaded model."""
    method, variant = what.split(":")
    dtype = _DTYPES[settings.dtype]
    model = build(variant, METHODS[method](), settings.plain().to(dtype))
    images, labels = settings.batch_of(settings.batch, dtype)
    with ResidentPeak() as peak:
        step = training_step(model, images, labels)
        for _ in range(3):
            step()
    return {"peak_bytes": peak.bytes}


def table(part: str, rows: dict[str, dict]) -> str:
    """Lay out the rows of a part, one line each."""
    lines = []
    for key, row in rows.items():
        if "error" in row:
            lines.append(f"{key:<72} ERROR {row['error']}")
        elif part == "verify":
            verdict = "ok" if row["passed"] else "FAILED"
            lines.append(f"{key:<72} {verdict:<7} error {row['fused_error']:.1e}  bound {row['bound']:.1e}")
        else:
            cells = [f"{key:<72} floor {row['floor']['median_ms']:8.2f} ms"]
            for name, variant in row["variants"].items():
                peak = f" {variant['peak_bytes'] / 2**20:7.0f} MiB" if "peak_bytes" in variant else ""
                cells.append(f"{name} {variant['median_ms']:8.2f} ms {variant['fraction_of_floor']:4.2f}{peak}")
            lines.append("  |  ".join(cells))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run a part; the exit status is 0 if every row that ran was right."""
    parser = argparse.ArgumentParser(prog="python -m bench.device", description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("verify", "steps"), default="verify")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=480, help="seconds after which no further row starts")
    parser.add_argument("--out", type=Path, help="result file; default bench/results/<device>/device.json")
    parser.add_argument("--again", action="store_true", help="run rows that the file already holds")
    parser.add_argument("--tiny", action="store_true", help="two narrow blocks at 32 px, to try the program out")
    parser.add_argument("--model", help="timm name; default vit_base_patch16_224")
    parser.add_argument("--image-size", type=int, help="default 224")
    parser.add_argument("--batch", type=int, help="images a step in `steps`; default 64 on CUDA, 8 elsewhere")
    parser.add_argument("--dtype", choices=_DTYPES, help="in `steps`; default bfloat16 on CUDA, float32 elsewhere")
    parser.add_argument("--turns", type=int, help="timed steps of each variant; default 20")
    parser.add_argument("--methods", help="comma-separated rows; default all")
    parser.add_argument("--compile", choices=("all", "some", "none"), help="in `steps`; default some on CUDA")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)

    settings = Settings(arguments)
    if arguments.measure:
        print(json.dumps(measure_resident(settings, arguments.measure)))
        return 0
    # The reference of `verify` is exact and the floor of `steps` is in the step's own type: no TF32 in either.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False

    record = Record(arguments.out or default_path(settings.device), settings.device)
    rows = list((verify_rows if arguments.part == "verify" else steps_rows)(settings))
    missing = [row for row in rows if arguments.again or not record.done(arguments.part, row[0])]
    ran = run_rows(arguments.part, missing, record, arguments.budget)
    if ran < len(missing):
        print(f"time is up: {len(missing) - ran} rows are left; the same command continues")
    keys = [key for key, _ in rows]
    shown = {key: row for key, row in record.rows(arguments.part).items() if key in keys}
    print(table(arguments.part, shown))
    print(f"results: {record.path}")
    return int(any("error" in row or row.get("passed") is False for row in shown.values()))


def run_rows(part: str, rows: list[Row], record: Record, budget: float) -> int:
    """Run rows until all are done or the next one, if as slow as the slowest, would overrun the budget."""
    started = time.perf_counter()
    slowest = 0.0
    for index, (key, run) in enumerate(rows):
        begin = time.perf_counter()
        if begin - started + slowest > budget and index:
            return index
        print(f"[{index + 1}/{len(rows)}] {key}", end=" ", flush=True)
        try:
            row = run()
        except Exception as error:  # one row's failure is that row's result; the others still run
            row = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        record.add(part, key, row)
        seconds = time.perf_counter() - begin
        slowest = max(slowest, seconds)
        print(f"{row.get('error', 'done')} ({seconds:.1f} s)", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        torch.compiler.reset()
    return len(rows)


if __name__ == "__main__":
    sys.exit(main())
