"""A table's runs, killed at random moments or shared by two workers: the rows of an unbroken study, each once."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("optuna")

ROOT = Path(__file__).resolve().parents[2]
# What a run's circumstances decide.
VARIES = ("seconds", "ms_per_image", "peak_memory_mb", "date")


def start(vtab: Path, out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "bench.tables", "vpt-1", "--backbone", "vit_tiny_patch16_224@random"]
    command += ["--image-size", "32", "--data", str(vtab), "--out", str(out), "--quick", "--epochs", "3"]
    command += ["--seeds", "2", "--tasks", "eurosat", "--methods", "linear", "bias"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*workers: subprocess.Popen) -> None:
    for worker in workers:
        said, _ = worker.communicate(timeout=240)
        assert worker.returncode == 0, said


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name not in VARIES} for row in csv.DictReader(file)]


def ordered(found: list[dict[str, str]]) -> list[tuple]:
    return sorted(tuple(row.items()) for row in found)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, vtab_of):
    folder = tmp_path_factory.mktemp("unbroken")
    finish(start(vtab_of(folder), folder / "out"))
    return folder


@pytest.mark.slow
def test_killed_at_random_moments(unbroken, tmp_path):
    draw = random.Random(time.time_ns())
    whole = rows(unbroken / "out")
    assert len(whole) == 8
    for _ in range(6):
        worker = start(unbroken / "vtab", tmp_path / "out")
        time.sleep(draw.uniform(2, 14))
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        worker.stdout.close()
    finish(start(unbroken / "vtab", tmp_path / "out"))
    assert ordered(rows(tmp_path / "out")) == ordered(whole)


@pytest.mark.slow
def test_two_workers(unbroken, tmp_path):
    finish(start(unbroken / "vtab", tmp_path / "out"), start(unbroken / "vtab", tmp_path / "out"))
    assert ordered(rows(tmp_path / "out")) == ordered(rows(unbroken / "out"))
