"""A row on a task: its grid, then its best setting with every seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.tables.job import Backbone, Job
from bench.tables.protocol import Point, Protocol, Row, best
from bench.tables.results import Results
from bench.tables.training_set import DEFAULT, TrainingSet

SEARCH_SEED = 0


@dataclass(frozen=True)
class Experiment:
    """The runs of a row on a task.

    Attributes:
        task: as in the papers.
        folder: of the task under the data's root.
        final: train the best setting on train800val200 and test it, with every seed.
        images: that it trains on.
    """

    backbone: Backbone
    root: Path
    task: str
    folder: str
    row: Row
    protocol: Protocol
    final: bool = True
    images: TrainingSet = DEFAULT

    @property
    def points(self) -> list[Point]:
        """The grid."""
        return list(self.protocol.grid(self.row))

    @property
    def size(self) -> int:
        """Number of runs."""
        return len(self.points) + len(self.protocol.seeds) * self.final

    def batches(self, results: Results) -> Iterator[list[Job]]:
        """The search; then, when it is in the results, the final runs."""
        yield self.search()
        if self.final:
            yield [self.of_best(results, "final", seed) for seed in self.protocol.seeds]

    def search(self) -> list[Job]:
        """The runs of the grid."""
        return [self.job("search", point, SEARCH_SEED) for point in self.points]

    def chosen(self, results: Results) -> Point:
        """The best setting, when the search is in the results."""
        return best([(one.setting, float(results.find(**one.key())["accuracy"])) for one in self.search()])

    def of_best(self, results: Results, stage: str, seed: int) -> Job:
        """One run with the best setting."""
        return self.job(stage, self.chosen(results), seed)

    def job(self, stage: str, point: Point, seed: int) -> Job:
        """One run."""
        row, setting = self.row, tuple(point.items())
        if stage == "search" and row.search_as:
            row = dataclasses.replace(row, name=row.search_as)
        where = (self.backbone, self.root, self.task, self.folder)
        return Job(*where, row, self.protocol, stage, setting, seed, images=self.images)
