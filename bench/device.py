"""Checks and measures the library on the device at hand, into one result file.

    python -m bench.device --part verify      # every kernel and every method's step against float64
    python -m bench.device --part tune        # the Triton kernels' launch choices, for the parts below and the library
    python -m bench.device --part ops         # operators against torch, xformers, Liger and the chip's own ceilings
    python -m bench.device --part steps       # training steps and inference against literal and peft
    python -m bench.device --part compiled    # the same against torch.compile
    python -m bench.device --part mplug       # training steps of mPLUG-base against literal
    python -m bench.device --part zero        # the trainer through DeepSpeed's launcher, ZeRO 1 and 3
    python -m bench.device --part summary     # the goals beside what the file holds; measures nothing

A part stops by itself after --budget seconds; the same command run again adds the rows that are missing and repeats
those that failed. Rows run in processes of their own, so that one that crashes or hangs costs no other. Needs torch,
timm and numpy; peft, xformers, liger-kernel and deepspeed for their rows. Wheels in the folder `wheels/` of the
checkout are used without being installed. `--device cpu --tiny` runs everything in little on any machine.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.device_parts import wheels, workers
from bench.device_parts.rows import Results, Row, failed
from bench.device_parts.settings import DTYPES, Settings
from bench.device_parts.workers import Turns, Worker
from bench.record import Record, default_path
from fastpeft._serve import GOES_ON, serve
from fastpeft.ops.choose import chip_of

PARTS = ("verify", "tune", "ops", "steps", "compiled", "mplug", "zero", "summary")
# Seconds after which a row is given up: a kernel's first compilation, max-autotune, two runs of the trainer.
_ROW_SECONDS = {"verify": 150, "tune": 240, "ops": 150, "steps": 240, "compiled": 420, "mplug": 240, "zero": 420}
# What a row that is under way when the budget is spent may take on top of it.
_GRACE_SECONDS = 45
_ROOT = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a part; the exit status is 0 if every row that the file holds of it is right."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser().parse_args(argv)
    return serve(lambda: _serve(arguments, argv), GOES_ON)


def _serve(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    # Of a worker too: it finds the folder that is there already.
    wheels.add()
    settings = Settings(arguments)
    # What is compared with is exact, and a step's floor is in the step's own format: no TF32 in either.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    part = importlib.import_module(f"bench.device_parts.{arguments.part}")
    rows: list[Row] = list(part.rows(settings))
    if arguments.worker:
        workers.serve(rows)
        return 0

    record = Record(arguments.out or default_path(settings.device), settings.device)
    held = record.rows(arguments.part)
    new = [row for row in rows if arguments.again or row[0] not in held]
    again = [row for row in rows if not arguments.again and row[0] in held and not record.done(arguments.part, row[0])]
    missing = [*new, *again]
    ran = _run(arguments, argv, missing, record)
    if ran < len(missing):
        print(f"time is up: {len(missing) - ran} rows are left; the same command continues")
    shown = {key: record.rows(arguments.part)[key] for key, _ in rows if key in record.rows(arguments.part)}
    chip = chip_of(settings.device)
    results = Results(record.parts, None if settings.tiny else (chip.kind, chip.capability))
    print(part.table(shown, results))
    print(f"results: {record.path}")
    return int(any(map(failed, shown.values())))


def _run(arguments: argparse.Namespace, argv: Sequence[str], rows: list[Row], record: Record) -> int:
    """Run rows; how many were begun."""
    if not rows:
        return 0
    turns = Turns(rows, arguments.budget, lambda key, row: record.add(arguments.part, key, row))
    count = arguments.workers
    if count is None:
        # Checks wait for the compiler; what is timed has the device to itself.
        side_by_side = arguments.part == "verify" and arguments.device.startswith("cuda")
        count = max(1, min(8, (os.cpu_count() or 1) // 2)) if side_by_side else 1
    if count == 0:
        return turns.here()
    if count > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "bench.device", *argv, "--worker"]
    until = time.perf_counter() + arguments.budget + _GRACE_SECONDS
    limit = arguments.limit or _ROW_SECONDS[arguments.part]
    log = record.path.with_suffix(".log")
    return turns.among([Worker(command, log, limit, until) for _ in range(min(count, len(rows)))])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.device", description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, default="verify")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=450, help="seconds after which no further row starts")
    parser.add_argument("--limit", type=float, help="seconds after which a row is given up; default by part")
    parser.add_argument("--workers", type=int, help="processes; 0 runs rows in this one; default by part")
    parser.add_argument("--out", type=Path, help="result file; default bench/results/<device>/device.json")
    parser.add_argument("--again", action="store_true", help="run rows that the file already holds")
    parser.add_argument("--tiny", action="store_true", help="two narrow blocks at 32 px, to try the program out")
    parser.add_argument("--model", help="timm name of the only model; default by part")
    parser.add_argument("--image-size", type=int, help="default 224")
    parser.add_argument("--batch", type=int, help="images a timed step; default 64 on CUDA, 8 elsewhere")
    parser.add_argument("--dtype", choices=DTYPES, help="of what is timed; default bfloat16 on CUDA, else float32")
    parser.add_argument("--turns", type=int, help="timed calls of each variant; default 20")
    parser.add_argument("--seed", type=int, help="of inputs; default drawn afresh for every row")
    parser.add_argument(
        "--methods", help="comma-separated, of bench.cases.METHODS, or mplug-lora and the like; default all"
    )
    parser.add_argument("--operators", help="comma-separated; default all")
    parser.add_argument("--backends", help="of training steps, comma-separated; default reference,triton")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
