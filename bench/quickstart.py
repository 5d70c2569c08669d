"""The quick start over several seeds: test accuracy, its mean, and what a run costs.

    python -m bench.quickstart [--seeds 0 1 2] [--runs FOLDER] [--out FILE]

Runs `deepspeed fastpeft/train.py --config configs/quickstart.yaml` once a seed, from the start.
Adds one row a seed and their mean to `bench/results/<device>/quickstart.json`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from bench.record import Record, default_path
from fastpeft._serve import GOES_ON, serve

_ROOT = Path(__file__).resolve().parents[1]
_KEPT = ("model", "trained_parameters", "trained_share", "seconds", "ms_per_image", "precision", "threads")


def train(seed: int, runs: Path) -> dict[str, object]:
    """One run of the quick start; what its results hold."""
    out = runs / f"seed-{seed}"
    command = [str(Path(sys.executable).with_name("deepspeed")), "fastpeft/train.py"]
    command += ["--config", "configs/quickstart.yaml", "--fresh", f"train.seed={seed}", f"out={out}"]
    subprocess.run(command, cwd=_ROOT, check=True)
    results = json.loads((out / "results.json").read_text())
    config = results["config"]
    row = {key: results[key] for key in _KEPT} | {"test_accuracy": results["test_accuracy"]["last"]}
    return row | {"method": config["method"], "train": config["train"], "versions": results["versions"]}


def main(arguments: list[str] | None = None) -> int:
    """Train every seed and write the file."""
    parser = argparse.ArgumentParser(prog="python -m bench.quickstart", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=_ROOT / "out" / "seeds", help="folder of the runs' folders")
    parser.add_argument("--out", type=Path, help="default: bench/results/<device>/quickstart.json")
    given = parser.parse_args(arguments)
    return serve(lambda: _serve(given), GOES_ON)


def _serve(arguments: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = Record(arguments.out or default_path(device).with_name("quickstart.json"), device)
    found = []
    for seed in arguments.seeds:
        row = train(seed, arguments.runs.resolve())
        found.append(row["test_accuracy"])
        record.add("quickstart", f"seed {seed}", row)
    record.add("quickstart", "mean", {"seeds": arguments.seeds, "test_accuracy": statistics.mean(found)})
    print(f"test accuracy {statistics.mean(found):.2%}, the mean of {len(found)} seeds")


if __name__ == "__main__":
    sys.exit(main())
