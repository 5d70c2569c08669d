"""One run, one worker: whichever studies a run is in, and whoever asks for it at the same moment."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from bench.tables import locks, lockstep, study, together
from bench.tables.ensemble import EnsembleJob
from bench.tables.errors import TableError
from bench.tables.job import Backbone, Job
from bench.tables.protocol import ROWS, Protocol
from bench.tables.results import FIELDS, KEY, Results

ROOT = Path(__file__).resolve().parents[2]


def jobs(vtab, row="bias", points=3, stage="search"):
    protocol = Protocol(2, 1, True, (42,))
    settings = [(("base_lr", 10.0**-number), ("weight_decay", 0.0)) for number in range(points)]
    backbone = Backbone("vit_tiny_patch16_224", "random", 32)
    return [Job(backbone, vtab, "eurosat", "eurosat", ROWS[row], protocol, stage, point, 0) for point in settings]


def row_of(job):
    return job.key() | {name: "1" for name in FIELDS if name not in KEY}


class Worker(threading.Thread):
    """Does a run as a worker of a study of all the jobs; `done` gives what it ended with."""

    def __init__(self, job, todo, results, runs):
        super().__init__(daemon=True)
        self._asked, self._error = (job, todo, results, runs, None), None
        self.start()

    def run(self):
        try:
            together.run(*self._asked)
        except BaseException as error:
            self._error = error

    def done(self):
        self.join(60)
        assert not self.is_alive()
        if self._error is not None:
            raise self._error


@pytest.fixture
def trained(monkeypatch):
    """Runs are not trained: what is, in its order; a function of the test is called in the middle of the first."""

    class Trained(list):
        middle = None

    trained = Trained()

    def run(self, runs, features=None):
        trained.append(self)
        self.out(runs).mkdir(parents=True)
        if len(trained) == 1 and trained.middle is not None:
            trained.middle()
        assert self.out(runs).is_dir(), "somebody has removed the folder of a run in progress"
        return row_of(self)

    monkeypatch.setattr(Job, "run", run)
    return trained


def test_a_run_of_two_studies_is_done_once(vtab, tmp_path, trained):
    job, *others = jobs(vtab)
    results, runs, workers = Results(tmp_path / "results.csv"), tmp_path / "runs", []

    def another():
        workers.append(Worker(job, [job], results, runs))
        # Long enough for it to begin, if nothing keeps it from that.
        workers[0].join(0.5)
        assert workers[0].is_alive() and len(trained) == 1
        # A run that nobody does is not waited for.
        together.run(others[0], [job, *others], results, runs, None)

    trained.middle = another
    together.run(job, [job, *others], results, runs, None)
    workers[0].done()
    assert trained == [job, others[0]] and len(results.rows()) == 2
    assert not [path for path in runs.iterdir() if path.is_dir()]


def test_an_ensemble_waits_for_its_members(vtab, tmp_path, trained, monkeypatch):
    members = tuple(jobs(vtab, points=2, stage="final"))
    ensemble, results, runs = EnsembleJob(members), Results(tmp_path / "results.csv"), tmp_path / "runs"
    asked = []
    monkeypatch.setattr(EnsembleJob, "run", lambda self, *_: asked.append(len(trained)) or row_of(self))
    workers = []

    def begin():
        workers.append(Worker(ensemble, [ensemble], results, runs))
        workers[0].join(0.5)
        assert workers[0].is_alive() and not asked

    trained.middle = begin
    together.run(members[1], members, results, runs, None)
    workers[0].done()
    assert asked == [1] and len(results.rows()) == 2


def test_a_group_leaves_what_another_worker_is_doing(vtab, tmp_path, trained, monkeypatch):
    todo, results, runs = jobs(vtab, "linear", points=4), Results(tmp_path / "results.csv"), tmp_path / "runs"
    counted = []

    def train(configs, source, ranks, store, folder, done):
        counted.append([config.out for config in configs])
        with locks.free([job.out(runs) for job in todo]) as free:
            assert not free, "somebody could begin what is being trained"
        for index in range(len(configs)):
            done(index, None)
        return True

    monkeypatch.setattr(lockstep, "train", train)
    # In another study, which has only this one in common with the group.
    trained.middle = lambda: together.run(todo[1], todo, results, runs, None)
    other = dataclasses.replace(todo[0], keep=True)
    together.run(other, [other], results, runs, None)
    assert counted == [[str(job.out(runs)) for job in todo[1:]]] and trained == [other]
    assert len(results.rows()) == 4
    together.run(todo[0], todo, results, runs, None)
    assert len(counted) == len(trained) == 1


def test_runs_that_do_not_go_together_are_done_by_several_workers_at_once(vtab, tmp_path, trained, monkeypatch):
    todo, results, runs = jobs(vtab, "linear"), Results(tmp_path / "results.csv"), tmp_path / "runs"
    monkeypatch.setattr(lockstep, "train", lambda *_: False)
    trained.middle = lambda: Worker(todo[1], todo, results, runs).done()
    together.run(todo[0], todo, results, runs, None)
    assert trained == todo[:2]


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_a_trial_whose_run_is_being_done_is_seen_from_its_first_moment(tmp_path):
    import optuna

    asked = optuna.create_study(storage=study.storage(None, tmp_path))
    for _ in range(2):
        asked.enqueue_trial({"run": "a"})
    asked.enqueue_trial({"run": "b"})
    # The first has asked for nothing yet.
    trials = [asked.ask() for _ in range(3)]
    for trial in trials[1:]:
        trial.suggest_categorical("run", ["a", "b"])
    assert [study._taken(trial) for trial in trials[1:]] == [True, False]
    trials[0].suggest_categorical("run", ["a", "b"])
    assert not study._taken(trials[0])


def test_locks_that_cannot_be_had(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TableError, match="cannot be locked: "), locks.held(tmp_path / "file" / "run"):
        pass
    with locks.held(tmp_path / "a", tmp_path / "b", tmp_path / "a"):
        with locks.free([tmp_path / "b", tmp_path / "c"]) as free:
            assert free == {tmp_path / "c"}
        worker = threading.Thread(target=lambda: locks.held(tmp_path / "b").__enter__(), daemon=True)
        worker.start()
        worker.join(0.2)
        assert worker.is_alive()
    worker.join(60)
    assert not worker.is_alive()


def test_what_several_need_is_removed_by_the_last(tmp_path):
    folder, removed = tmp_path / "runs" / "one", []

    def begin():
        needed = locks.needed(folder, lambda: removed.append(folder))
        needed.__enter__()
        return needed

    first, second, failing = begin(), begin(), begin()
    first.__exit__(None, None, None)
    # One that ends with an error leaves it, and no longer needs it.
    assert not failing.__exit__(ValueError, ValueError("went wrong"), None)
    assert not removed
    third = begin()
    second.__exit__(None, None, None)
    assert not removed
    # Somebody who never said so is making it.
    with locks.held(folder):
        third.__exit__(None, None, None)
        assert not removed
    begin().__exit__(None, None, None)
    assert removed == [folder]


@pytest.mark.slow
def test_what_a_killed_worker_needed_is_needed_no_more(tmp_path):
    """Another process, as a worker is: its locks end with it."""
    folder = tmp_path / "one"
    folder.mkdir()
    code = (
        "import os, pathlib, sys\n"
        "from bench.tables import locks\n"
        "needed = locks.needed(pathlib.Path(sys.argv[1]), lambda: None)\n"
        "needed.__enter__()\n"
        "print('needs it', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as worker:
        try:
            assert worker.stdout.readline() == "needs it\n"
            with locks.needed(folder, folder.rmdir):
                pass
            assert folder.is_dir()
        finally:
            worker.kill()
    with locks.needed(folder, folder.rmdir):
        pass
    assert not folder.exists()
