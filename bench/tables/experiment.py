"""A row on a task: its grid, then its best setting with every seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.tables.job import Backbone, Job
from bench.tables.protocol import Point, Protocol, Row, best
from bench.tables.results import Results

SEARCH_SEED = 0


@dataclass(frozen=True)
class Experiment:
    """The runs of a row on a task.

    Attributes:
        task: as in the papers.
        folder: of the task under the data's root.
        final: train the best setting on train800val200 and test it, with every seed.
    """

    backbone: Backbone
    root: Path
    task: str
    folder: str
    row: Row
    protocol: Protocol
    final: bool = True

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
        search = [self.job("search", point, SEARCH_SEED) for point in self.points]
        yield search
        if self.final:
            scores = [(one.setting, float(results.find(**one.key())["accuracy"])) for one in search]
            yield [self.job("final", best(scores), seed) for seed in self.protocol.seeds]

    def job(self, stage: str, point: Point, seed: int) -> Job:
        """One run."""
        setting = tuple(point.items())
        return Job(self.backbone, self.root, self.task, self.folder, self.row, self.protocol, stage, setting, seed)
