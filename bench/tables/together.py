"""Which runs of a study one computation can do, and having them done there."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.tables import locks, lockstep
from bench.tables.ensemble import EnsembleJob
from bench.tables.errors import TableError
from bench.tables.job import Job
from bench.tables.results import Results
from fastpeft.config import Config
from fastpeft.trainer import launch
from fastpeft.trainer.feature_store import FeatureStore

# Methods that train nothing before the last blocks.
_CHEAP = ("linear", "mlp_head", "partial")
# What may differ between runs of one computation.
_FREE = ("train.base_lr", "train.weight_decay", "train.seed")


def run(job: Job, jobs: Sequence[Job], results: Results, runs: Path, features: FeatureStore | None) -> None:
    """Have a run in the results; where one computation can do others of its study too, have those there as well.

    Of several workers that want one run, or runs of one group, one computes and the others wait for it; if it is killed
    the next goes on. Studies may have runs in common: what a worker is doing no other begins, whatever study it is in.

    Args:
        job: the run.
        jobs: all runs of its study.
        results: where rows go.
        runs: folder of the runs' folders.
        features: where features are kept; None keeps nothing.

    Raises:
        TableError: the results cannot be written.
        ConfigError: a run cannot begin.
    """
    group = _group(job, jobs, runs) if launch.find_ranks().world == 1 else [job]
    if len(group) > 1:
        folder = runs / f"{job.task}-{job.row.name}-{job.stage}-together-{_digest([str(one.key()) for one in group])}"
        with locks.held(folder):
            _do_together(group, results, runs, folder, features)
    with locks.held(*_folders(job, runs)):
        if not results.has(**job.key()):
            results.add(job.run(runs, store_for(job, features)))
            job.clear(runs)


def _folders(job: Job | EnsembleJob, runs: Path) -> list[Path]:
    """Those that a job trains in, and clears."""
    return [one.out(runs) for one in (job.members if isinstance(job, EnsembleJob) else [job])]


def _do_together(group: list[Job], results: Results, runs: Path, folder: Path, features: FeatureStore | None) -> None:
    """Have the rows of a group, but for those of runs that other workers are doing, if its runs go together."""

    def lacking(some: list[Job]) -> list[Job]:
        return [one for one in some if not results.has(**one.key())]

    wanted = {one.out(runs): one for one in lacking(group)}
    with locks.free(wanted) as free:
        # What another worker was doing when it was looked for may be done now.
        left = lacking([one for out, one in wanted.items() if out in free])
        try:
            if len(left) > 1 and _run_group(left, results, runs, folder, features):
                shutil.rmtree(folder, ignore_errors=True)
        except OSError as error:
            raise TableError(
                f"{folder}: cannot be written: {error.strerror or error}; what was measured is in {results.path}"
            ) from error


def store_for(job: Job, features: FeatureStore | None) -> FeatureStore | None:
    """The store with the splits that other runs read too."""
    return None if features is None else features.of(*job.read_again)


def _run_group(group: list[Job], results: Results, runs: Path, folder: Path, features: FeatureStore | None) -> bool:
    """Have the rows of a group in the results; False, with nothing done, if its runs do not go together."""

    def done(index: int, outcome: lockstep.Outcome) -> None:
        results.add(group[index].row_of(outcome, runs))

    configs = [one.config(one.out(runs)) for one in group]
    return lockstep.train(configs, str(group[0]), launch.find_ranks(), store_for(group[0], features), folder, done)


def _group(job: Job, jobs: Sequence[Job], runs: Path) -> list[Job]:
    """The runs of a study that differ from one in nothing that decides features, shapes or number of steps."""
    shape = None if job.alone else _shape(job.config(job.out(runs)))
    if shape is None:
        return [job]
    return [one for one in jobs if not one.alone and _shape(one.config(one.out(runs))) == shape]


def _shape(config: Config) -> dict[str, Any] | None:
    """What runs of one computation have in common; None for a run that has to go alone."""
    if not isinstance(config.method, dict) or config.method["name"] not in _CHEAP:
        return None
    return {key: value for key, value in config.identity().items() if key not in _FREE}


def _digest(names: list[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
