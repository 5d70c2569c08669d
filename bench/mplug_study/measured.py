"""What was measured, by method, size, share and classifier."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from bench.mplug_study.job import FINAL
from bench.tables.results import Line


@dataclass(frozen=True)
class Cell:
    """The runs of one setting, one a seed.

    Attributes:
        method: its name.
        size: of its module.
        ratio: share of the data.
        classifier: whether the output layer was trained too.
        scores: times a hundred.
        trained: parameters.
        samples: that it was trained on.
    """

    method: str
    size: int
    ratio: float
    classifier: bool
    scores: tuple[float, ...]
    trained: int
    samples: int

    @property
    def mean(self) -> float:
        """Of the seeds."""
        return fmean(self.scores)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds, 0 for one."""
        return stdev(self.scores) if len(self.scores) > 1 else 0.0

    @property
    def cost(self) -> float:
        """The study's: training samples times trained parameters."""
        return float(self.trained) * self.samples


def select(lines: Iterable[Line], **where: object) -> list[Line]:
    """The lines with these fields."""
    wanted = {name: str(value) for name, value in where.items()}
    return [line for line in lines if all(line[name] == value for name, value in wanted.items())]


def cells(lines: Sequence[Line]) -> list[Cell]:
    """The settings of final runs, in the order in which they came; runs that diverged have no part in them."""
    found: dict[tuple, list[Line]] = {}
    for line in select(lines, stage=FINAL):
        if line["trained_parameters"]:
            place = (line["method"], int(line["size"]), float(line["ratio"]), line["classifier"] == "yes")
            found.setdefault(place, []).append(line)
    return [
        Cell(
            *place,
            scores=tuple(100 * float(line["score"]) for line in own),
            trained=int(own[0]["trained_parameters"]),
            samples=int(own[0]["train_size"]),
        )
        for place, own in found.items()
    ]


def reference_size(found: Sequence[Cell], method: str) -> int | None:
    """The size of which there are the most shares; of equals the smallest; None where the method was not run."""
    shares: dict[int, set[float]] = {}
    for cell in found:
        if cell.method == method:
            shares.setdefault(cell.size, set()).add(cell.ratio)
    return max(shares, key=lambda size: (len(shares[size]), -size)) if shares else None
