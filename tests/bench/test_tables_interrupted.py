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


def start(vtab: Path, out: Path, seeds: int = 2) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.bench.counted_worker", str(out.parent / "begun.txt"), "vpt-1"]
    command += ["--backbone", "vit_tiny_patch16_224@random"]
    command += ["--image-size", "32", "--data", str(vtab), "--out", str(out), "--quick", "--epochs", "3"]
    command += ["--seeds", str(seeds), "--tasks", "eurosat", "--methods", "linear", "bias"]
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


def counted(out: Path) -> tuple[list[tuple[str, int, str]], dict[str, list[str]]]:
    """Every training that began, as run, step and process; and by run what happened to it, in its order."""
    begun, told = [], {}
    for line in (out.parent / "begun.txt").read_text().splitlines():
        what, run, *more = line.split()
        told.setdefault(run, []).append(what)
        if what == "begin":
            begun.append((run, int(more[0]), more[1]))
    return begun, told


def assert_each_once(out: Path, runs: int) -> None:
    """Every run was begun once, from its beginning, and kept."""
    begun, told = counted(out)
    assert all(step == 0 for _, step, _ in begun)
    assert [events for events in told.values() if events[:2] != ["begin", "kept"] or events.count("begin") > 1] == []
    assert len(told) == runs


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, vtab_of):
    folder = tmp_path_factory.mktemp("unbroken")
    finish(start(vtab_of(folder), folder / "out"))
    assert_each_once(folder / "out", 8)
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
    begun, told = counted(tmp_path / "out")
    # What has a row is not begun again, a worker begins nothing twice, and what was killed goes on where it was.
    assert [events for events in told.values() if "begin" in events[events.index("kept") :]] == []
    assert len({(run, process) for run, _, process in begun}) == len(begun) and len(told) == 8
    for wanted in told:
        steps = [step for run, step, _ in begun if run == wanted]
        assert steps == sorted(steps) and len(steps) <= 7


@pytest.mark.slow
def test_two_workers(unbroken, tmp_path):
    finish(start(unbroken / "vtab", tmp_path / "out"), start(unbroken / "vtab", tmp_path / "out"))
    assert ordered(rows(tmp_path / "out")) == ordered(rows(unbroken / "out"))
    assert_each_once(tmp_path / "out", 8)


@pytest.mark.slow
def test_two_workers_of_studies_that_have_runs_in_common(unbroken, tmp_path):
    # With one seed a study of final runs is another, and its run is one of the other's two.
    finish(start(unbroken / "vtab", tmp_path / "out"), start(unbroken / "vtab", tmp_path / "out", seeds=1))
    assert ordered(rows(tmp_path / "out")) == ordered(rows(unbroken / "out"))
    assert_each_once(tmp_path / "out", 8)
