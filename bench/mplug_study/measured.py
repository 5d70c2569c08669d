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


def share(ratio: float) -> str:
    """A share of the data, in percent with the digits that tell it from another."""
    return f"{100 * ratio:g}%"


def finals(lines: Iterable[Line], seeds: Sequence[int]) -> list[Line]:
    """The final runs with these seeds."""
    return [line for line in select(lines, stage=FINAL) if int(line["seed"]) in seeds]


def diverged(line: Line) -> bool:
    """Whether the run ended because its loss was not finite: its score of zero is no measurement."""
    return not line["trained_parameters"]


def cells(lines: Iterable[Line], seeds: Sequence[int]) -> list[Cell]:
    """The settings of final runs, in the order in which they came; runs that diverged have no part in them.

    Args:
        lines: of one corpus under one protocol.
        seeds: the protocol's; runs with others are not looked at.
    """
    found: dict[tuple, list[Line]] = {}
    for line in finals(lines, seeds):
        if not diverged(line):
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


def reference_size(found: Sequence[Cell], method: str, usual: int | None = None) -> int | None:
    """The size of which there are the most shares; None where the method was not run.

    Args:
        found: what was measured.
        method: whose.
        usual: of sizes with equally many shares, the one to be taken; else the smallest.
    """
    shares: dict[int, set[float]] = {}
    for cell in found:
        if cell.method == method:
            shares.setdefault(cell.size, set()).add(cell.ratio)
    return max(shares, key=lambda size: (len(shares[size]), size == usual, -size)) if shares else None
