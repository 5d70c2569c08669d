"""A list of runs, each done once by whichever worker takes it: a grid as an Optuna study.

Every run is a waiting trial that is enqueued once. Workers on any machines that share the storage take them one by one.
A worker that dies stops beating; its trial is failed and enqueued again, and what its run had reached is continued
where the checkpoints are at hand.
"""

from __future__ import annotations

import hashlib
import os
import random
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.tables import together
from bench.tables.errors import TableError
from bench.tables.job import Job
from bench.tables.results import Results
from fastpeft.errors import FastPEFTError
from fastpeft.trainer.feature_store import FeatureStore

# Seconds that a database is waited for which another process is writing to, of those that are single files.
_PATIENCE = 60.0
# Seconds between two signs of life of a worker, and after how many it is taken for dead.
_HEARTBEAT, _GRACE = 30, 120
_RETRIES = 3
# On every trial that is wanted; what Optuna draws of itself has it not.
_ASKED = "asked"
# Who does a trial: machine and process.
_WORKER = "worker"


def storage(url: str | None, folder: Path):
    """Where studies are kept.

    Args:
        url: any that Optuna knows; None for an SQLite file in the folder.
        folder: of the results.

    Raises:
        TableError: it cannot be opened.
    """
    import optuna

    from bench.tables import database

    # What fails is said once, by us; as warnings Optuna prints tracebacks.
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if url is None:
        folder.mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{folder / 'studies.db'}"
    options = {"connect_args": {"timeout": _PATIENCE}} if url.startswith("sqlite") else {}
    # Heartbeats are called experimental, and have been for years.
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    retry = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=_RETRIES)
    started = time.monotonic()
    for last in (False, False, False, True):
        try:
            return database.Database(
                url, options, heartbeat_interval=_HEARTBEAT, grace_period=_GRACE, heartbeat_stale_trial_callback=retry
            )
        except (*database.ERRORS, ImportError, ValueError, RuntimeError) as error:
            # Two workers that begin at once both make the tables: one of them finds the other's a moment later. What
            # was waited for in vain is held by somebody who does something else.
            again = isinstance(error, database.ERRORS) and time.monotonic() - started < _PATIENCE
            if last or not again:
                raise TableError(f"--storage {url}: cannot be opened: {database.reason(error)}") from error
            time.sleep(random.uniform(0.2, 1.0))
    raise AssertionError("unreachable")


def run_all(
    jobs: Sequence[Job],
    results: Results,
    runs: Path,
    store,
    advance: Callable[[Job], None],
    features: FeatureStore | None = None,
) -> None:
    """Have every job in the results: done here, done before, or done by another worker meanwhile.

    Args:
        jobs: the runs, in the order in which they are to begin.
        results: where their rows go.
        runs: folder of the runs' folders.
        store: from `storage`.
        advance: called with every job that is done, whoever did it.
        features: where features are kept that several jobs need; None keeps nothing.

    Raises:
        TableError: the storage or the results cannot be written.
        FastPEFTError: a run cannot begin.
    """
    import optuna
    from optuna.trial import TrialState

    from bench.tables import database

    jobs = list(jobs)
    said: set[int] = set()

    def say_done() -> list[int]:
        rows = {tuple(row[name] for name in jobs[0].key()) for row in results.rows()}
        left = []
        for number, job in enumerate(jobs):
            if tuple(str(value) for value in job.key().values()) not in rows:
                left.append(number)
            elif number not in said:
                said.add(number)
                advance(job)
        return left

    if not jobs or not say_done():
        return
    names = _names(jobs)

    def objective(trial: optuna.Trial) -> float:
        job = jobs[names.index(trial.suggest_categorical("run", names))]
        if _ASKED not in trial.user_attrs or _taken(trial):
            # Between two workers' looks at the queue its last trial went: what Optuna draws instead is not wanted.
            raise optuna.TrialPruned
        found = results.find(**job.key())
        if found is None:
            trial.set_user_attr(_WORKER, _me())
            together.run(job, jobs, results, runs, features)
            found = results.find(**job.key())
        return results.score(found)

    try:
        study = optuna.create_study(
            storage=store, study_name=_name(jobs), direction="maximize", load_if_exists=True,
            sampler=optuna.samplers.RandomSampler(),
        )  # fmt: skip
        for number in say_done():
            study.enqueue_trial({"run": names[number]}, {_ASKED: True}, skip_if_exists=True)
        while say_done():
            waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
            if not waiting:
                optuna.storages.fail_stale_trials(study)
                _fail_the_dead(study)
                if study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                    continue
                left = say_done()
                if not left:
                    break
                if study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                    time.sleep(1.0)
                    continue
                # Rows that were removed from the results, or trials that failed too often: once more from the start.
                for number in left:
                    study.enqueue_trial({"run": names[number]}, {_ASKED: True}, skip_if_exists=False)
            _do_one(study, objective)
        # Of runs that were done together one trial did them all; the others take note of theirs.
        while study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            _do_one(study, objective)
    except FastPEFTError:
        raise
    except Exception as error:
        failed = database.failure(error)
        if failed is None:
            raise
        raise TableError(
            f"the storage of the studies failed: {database.reason(failed)}; what was measured is in {results.path}, "
            "the same command goes on from there"
        ) from error


def _do_one(study, objective: Callable[[Any], float]) -> None:
    """Do a waiting trial; one that another worker ended meanwhile stays as that one left it.

    A worker whose signs of life did not come through, for one because its machine slept, is taken for dead. What it
    measures after all is kept by then, and Optuna refuses the trial's end.
    """
    import optuna

    from bench.tables import database

    over: list[optuna.Trial] = []

    def noted(trial: optuna.Trial) -> float:
        try:
            value = objective(trial)
        except optuna.TrialPruned:
            over.append(trial)
            raise
        over.append(trial)
        return value

    try:
        study.optimize(noted, n_trials=1)
    except Exception as error:
        if not over or database.failure(error) is not None:
            raise
        if not study.trials[over[0].number].state.is_finished():
            raise


def _taken(trial) -> bool:
    """Whether an earlier trial of the same run is being done: two workers may have enqueued it at once."""
    from optuna.trial import TrialState

    running = trial.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    # What a trial has been enqueued with: its parameters are written only when its worker asks for them.
    asked = [other.system_attrs.get("fixed_params", other.params) for other in running if other.number < trial.number]
    return any(params.get("run") == trial.params["run"] for params in asked)


def _me() -> str:
    return f"{socket.gethostname()} {os.getpid()}"


def _fail_the_dead(study) -> None:
    """Fail what workers of this machine had begun that are gone, without waiting for their hearts to have stopped."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        host, _, process = trial.user_attrs.get(_WORKER, "").partition(" ")
        if (
            host == socket.gethostname()
            and process
            and not Path(f"/proc/{process}").exists()
            and Path("/proc").exists()
        ):
            # Another worker may have said so meanwhile.
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def _names(jobs: Sequence[Job]) -> list[str]:
    """What each run is called in the study: its text, with its key where others have the same text."""
    texts = [str(job) for job in jobs]
    return [
        text if texts.count(text) == 1 else f"{text} ({', '.join(map(str, job.key().values()))})"
        for text, job in zip(texts, jobs, strict=True)
    ]


def _name(jobs: Sequence[Job]) -> str:
    """Of the study that holds these runs and no others."""
    keys = [job.key() for job in jobs]
    named = [f"{job} {key['backbone']} {key['protocol']}" for job, key in zip(jobs, keys, strict=True)]
    digest = hashlib.sha256("\n".join(named).encode()).hexdigest()
    return f"{keys[0]['task']}/{keys[0]['method']}/{keys[0]['stage']}/{digest[:12]}"
