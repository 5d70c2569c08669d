"""The database that studies are kept in: Optuna's, whose failures end in one line of ours."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Sequence

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages._rdb.models import TrialModel
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

# Optuna gives some of SQLAlchemy's errors a name of its own, others it lets through.
ERRORS = (SQLAlchemyError, StorageInternalError)


class Database(optuna.storages.RDBStorage):
    """Studies in a database, where a sign of life that comes too late ends nothing, and a trial goes to one worker."""

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """Change a trial's state; of several workers that would begin a waiting one a single one is told True.

        Optuna reads the state and writes it in two statements. Where rows cannot be locked, as in SQLite, two workers
        both read that the trial waits.
        """
        if state == TrialState.RUNNING:
            waits = sqlalchemy.and_(TrialModel.trial_id == trial_id, TrialModel.state == TrialState.WAITING)
            begin = sqlalchemy.update(TrialModel).where(waits)
            with self.engine.begin() as connection:
                found = connection.execute(begin.values(state=state, datetime_start=datetime.datetime.now()))
            if found.rowcount == 1:
                return True
        # A trial that does not wait, or is not there: Optuna says which.
        return super().set_trial_state_values(trial_id, state, values)

    def record_heartbeat(self, trial_id: int) -> None:
        """Say that a trial is being done, if the database takes it.

        Optuna's heart would stop at the first beat that fails, with a traceback from a thread of its own, while the
        run goes on. The next beat may come through, and a worker that takes the run for abandoned waits for its lock.
        """
        with contextlib.suppress(*ERRORS):
            super().record_heartbeat(trial_id)


def failure(error: BaseException | None) -> Exception | None:
    """What the database failed with, if that is behind an error.

    Where a trial's end cannot be noted Optuna stumbles over its own bookkeeping, and what it raises says nothing.
    """
    while error is not None and not isinstance(error, ERRORS):
        error = error.__cause__ or error.__context__
    return error


def reason(error: BaseException) -> str:
    """An error in a line: what the driver said, where Optuna only says that something went wrong."""
    if isinstance(error, StorageInternalError):
        error = error.__cause__ or error
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
