"""Kinds of runs beside a search and its final runs: prompts after full fine-tuning, and losses by epoch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.tables import locks
from bench.tables.experiment import Experiment
from bench.tables.job import TUNED, Job
from bench.tables.protocol import Point
from bench.tables.results import Results

CURVE = "curve"


@dataclass(frozen=True)
class AfterTuning(Experiment):
    """A row whose runs begin with what full fine-tuning has trained, by the best of its own settings: FT-then-PT.

    A search run begins with a backbone that was tuned on the same training images, a final run with one that was tuned
    on all of them and with the final run's seed. The head goes on from where full fine-tuning left it.

    Attributes:
        tuning: the search of full fine-tuning.
        runs: folder of the runs' folders, from which a tuned backbone is removed when nobody needs it any more.
    """

    tuning: Experiment | None = None
    runs: Path = Path()

    @property
    def size(self) -> int:
        """Number of runs, full fine-tuning's search among them."""
        return super().size + len(self.tuning.points)

    def batches(self, results: Results) -> Iterator[list[Job]]:
        """Full fine-tuning's search, the search on what it tuned, the final runs on what it tuned with their seeds."""
        yield self.tuning.search()
        tuned = self.tuning.chosen(results)
        yield from _and_clear([self._after(job, tuned) for job in self.search()], self.runs)
        for seed in self.protocol.seeds if self.final else ():
            # One seed after the other: a tuned backbone takes room.
            yield from _and_clear([self.of_best(results, "final", seed)], self.runs)

    def of_best(self, results: Results, stage: str, seed: int) -> Job:
        """One run with the best setting, on what full fine-tuning's best setting tuned in the same stage."""
        return self._after(super().of_best(results, stage, seed), self.tuning.chosen(results))

    def _after(self, job: Job, tuned: Point) -> Job:
        return dataclasses.replace(job, start=self.tuning.job(job.stage, tuned, job.seed))


@dataclass(frozen=True)
class Curve:
    """A row's search, and one run of its best setting that is tested after every epoch.

    Attributes:
        experiment: the row's.
    """

    experiment: Experiment

    @property
    def size(self) -> int:
        """Number of runs."""
        return dataclasses.replace(self.experiment, final=False).size + 1

    def batches(self, results: Results) -> Iterator[list[Job]]:
        """The search; then the run."""
        own = dataclasses.replace(self.experiment, final=False)
        yield from own.batches(results)
        job = own.of_best(results, CURVE, own.protocol.seeds[0])
        yield from [[job]] if job.start is None else _and_clear([job], own.runs)


def _and_clear(jobs: list[Job], runs: Path) -> Iterator[list[Job]]:
    """Runs that begin with one tuned backbone, and its end when they are done, unless another study needs it."""
    start, tuned = jobs[0].start, runs / TUNED
    with locks.needed(start.out(tuned), lambda: start.clear(tuned)):
        yield jobs
