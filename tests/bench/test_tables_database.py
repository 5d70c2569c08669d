"""A study's database that is held by somebody, or full: one line, and what was measured stays."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("optuna")

import sqlalchemy

from bench.tables import study
from bench.tables.__main__ import main
from bench.tables.errors import TableError
from bench.tables.job import Backbone, Job
from bench.tables.protocol import ROWS, Protocol
from bench.tables.results import FIELDS, KEY, Results


@contextlib.contextmanager
def held(path, how="exclusive"):
    """Another connection has the database to itself."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute(f"begin {how}")
    try:
        yield
    finally:
        other.close()


@pytest.fixture
def impatient(monkeypatch):
    """What is held is waited for only a moment."""
    monkeypatch.setattr(study, "_PATIENCE", 0.2)


@pytest.fixture
def opened(monkeypatch):
    """Counts attempts to open a database."""
    from optuna.storages import RDBStorage

    attempts, init = [], RDBStorage.__init__

    def count(self, *arguments, **options):
        attempts.append(arguments)
        init(self, *arguments, **options)

    monkeypatch.setattr(RDBStorage, "__init__", count)
    return attempts


def jobs(vtab, points=3, more=()):
    protocol = Protocol(2, 1, True, (42,))
    settings = [(("base_lr", 10.0**-number), ("weight_decay", 0.0), *more) for number in range(points)]
    backbone = Backbone("vit_tiny_patch16_224", "random", 32)
    return [Job(backbone, vtab, "eurosat", "eurosat", ROWS["bias"], protocol, "search", point, 0) for point in settings]


@pytest.fixture
def begun(monkeypatch):
    """Runs are not trained; a function of the test is called in the middle of each."""
    begun = []

    def run(self, *_):
        for each in begun:
            each(self)
        return self.key() | {name: "1" for name in FIELDS if name not in KEY}

    monkeypatch.setattr(Job, "run", run)
    return begun


def test_a_database_that_is_held_is_waited_for_once(vtab, tmp_path, impatient, opened, capsys):
    (tmp_path / "out").mkdir()
    place = ["--backbone", "vit_tiny_patch16_224@random", "--data", str(vtab), "--out", str(tmp_path / "out")]
    with held(tmp_path / "out" / "studies.db"):
        assert main(["vpt-1", *place]) == 2
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1 and "studies.db: cannot be opened: (sqlite3.OperationalError) database is locked" in said
    )
    assert len(opened) == 1


def test_a_database_that_can_be_read_and_not_written(tmp_path, impatient, opened):
    study.storage(None, tmp_path)
    with sqlite3.connect(tmp_path / "studies.db") as other:
        other.execute("delete from version_info")
    other.close()
    opened.clear()
    with held(tmp_path / "studies.db", "immediate"), pytest.raises(TableError, match="database is locked"):
        study.storage(None, tmp_path)
    assert len(opened) == 1


def test_what_another_worker_makes_at_the_same_moment_is_found_a_moment_later(tmp_path, monkeypatch, opened):
    from optuna.storages._rdb import models

    make, failed = models.BaseModel.metadata.create_all, []

    def first_fails(engine):
        if not failed:
            failed.append(engine)
            raise sqlalchemy.exc.OperationalError("create table", {}, Exception("table studies already exists"))
        make(engine)

    monkeypatch.setattr(models.BaseModel.metadata, "create_all", first_fails)
    monkeypatch.setattr(study.time, "sleep", lambda seconds: None)
    study.storage(None, tmp_path)
    assert len(opened) == 2


# The first beat of a heart is in a thread of its own: an error there must not get out either.
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_database_that_is_held_while_runs_are_done(vtab, tmp_path, impatient, begun, capfd):
    todo, results, store = jobs(vtab), Results(tmp_path / "results.csv"), study.storage(None, tmp_path)
    with contextlib.ExitStack() as stack:
        trained = []

        def hold(job):
            trained.append(job)
            if len(trained) == 2:
                stack.enter_context(held(tmp_path / "studies.db"))

        begun.append(hold)
        with pytest.raises(TableError, match=r"the storage of the studies failed: .*database is locked; .*goes on"):
            study.run_all(todo, results, tmp_path / "runs", store, lambda job: None)
        assert len(results.rows()) == 2
        with pytest.raises(TableError, match="database is locked"):
            study.run_all(todo, results, tmp_path / "runs", store, lambda job: None)
    assert "Traceback" not in capfd.readouterr().err
    # What Optuna could not note of the second run keeps nobody from the third.
    study.run_all(todo, results, tmp_path / "runs", store, lambda job: None)
    assert trained == todo and len(results.rows()) == 3


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_database_without_room(vtab, tmp_path, begun, capfd):
    # Settings so long that each trial takes pages of its own.
    todo = jobs(vtab, more=tuple((f"setting-{number}", 1.0) for number in range(300)))
    results, store = Results(tmp_path / "results.csv"), study.storage(None, tmp_path)

    def full(connection, _):
        # As many pages as there are.
        connection.execute("pragma max_page_count = 1")

    sqlalchemy.event.listen(store.engine, "connect", full)
    begun.append(lambda job: store.engine.dispose())
    with pytest.raises(TableError, match=r"the storage of the studies failed: .*database or disk is full; what was"):
        study.run_all(todo, results, tmp_path / "runs", store, lambda job: None)
    assert 0 < len(results.rows()) < 3
    assert "Traceback" not in capfd.readouterr().err
    sqlalchemy.event.remove(store.engine, "connect", full)
    store.engine.dispose()
    study.run_all(todo, results, tmp_path / "runs", store, lambda job: None)
    assert len(results.rows()) == 3


def test_a_beat_that_does_not_come_through(tmp_path, impatient):
    import optuna

    store = study.storage(None, tmp_path)
    asked = optuna.create_study(storage=store)
    asked.enqueue_trial({})
    (trial,) = asked.trials
    with held(tmp_path / "studies.db"):
        store.record_heartbeat(trial._trial_id)
    store.record_heartbeat(trial._trial_id)
    with sqlite3.connect(tmp_path / "studies.db") as other:
        assert other.execute("select count(*) from trial_heartbeats").fetchone() == (1,)
    other.close()


def test_another_error_is_not_the_databases(vtab, tmp_path, begun):
    store, results = study.storage(None, tmp_path), Results(tmp_path / "results.csv")

    def wrong(job):
        raise ZeroDivisionError("not the database")

    begun.append(wrong)
    with pytest.raises(ZeroDivisionError):
        study.run_all(jobs(vtab, 1), results, tmp_path / "runs", store, lambda job: None)


def test_runs_of_one_name_are_all_done(vtab, tmp_path, begun, monkeypatch):
    monkeypatch.setattr(Job, "__str__", lambda self: "a run")
    todo, results, trained = jobs(vtab), Results(tmp_path / "results.csv"), []
    begun.append(trained.append)
    study.run_all(todo, results, tmp_path / "runs", study.storage(None, tmp_path), lambda job: None)
    assert len(trained) == len(results.rows()) == 3


def test_a_waiting_trial_goes_to_one_worker(tmp_path):
    """Workers that all read that it waits before any of them begins it."""
    import optuna
    from optuna.trial import TrialState

    stores = [study.storage(None, tmp_path) for _ in range(4)]
    asked = optuna.create_study(storage=stores[0])
    for _ in range(40):
        asked.enqueue_trial({})
    together = threading.Barrier(len(stores))

    def begin(store):
        begun = []
        for trial in asked.trials:
            together.wait()
            begun.append(store.set_trial_state_values(trial._trial_id, TrialState.RUNNING))
        return begun

    with ThreadPoolExecutor(len(stores)) as pool:
        begun = list(pool.map(begin, stores))
    assert [sum(each) for each in zip(*begun, strict=True)] == [1] * 40
    assert all(trial.state == TrialState.RUNNING and trial.datetime_start for trial in asked.get_trials())


@pytest.mark.parametrize("state", ["FAIL", "COMPLETE"])
def test_a_trial_that_another_worker_ends_meanwhile(vtab, tmp_path, begun, state):
    import optuna
    from optuna.trial import TrialState

    todo, results, store = jobs(vtab), Results(tmp_path / "results.csv"), study.storage(None, tmp_path)
    trained = []

    def end(job):
        trained.append(job)
        (name,) = optuna.get_all_study_names(store)
        other = optuna.load_study(study_name=name, storage=store)
        (running,) = other.get_trials(states=(TrialState.RUNNING,))
        value = {"values": 0.5} if state == "COMPLETE" else {"state": TrialState.FAIL}
        other.tell(running.number, **value)

    begun.append(end)
    study.run_all(todo, results, tmp_path / "runs", store, lambda job: None)
    assert trained == todo and len(results.rows()) == 3
