"""Every figure of a result folder: which there are, their names and what they show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from bench.figures import cost, losses, parameters, samples, sensitivity, significance, style, tasks
from bench.figures.studies import Study, methods_of, searched, studies
from bench.tables import curves
from bench.tables.results import Line, Results

FOLDER = "figures"


@dataclass(frozen=True)
class Kind:
    """A figure of a study.

    Attributes:
        name: in file names and anchors.
        title: in headings.
        draw: from rows to figure, None where they have nothing of it.
        every_size: whether it takes the rows of all numbers of training images, and not of the main one alone.
    """

    name: str
    title: str
    draw: Callable[[Sequence[Line]], Figure | None]
    every_size: bool = False


KINDS = (
    Kind("tasks", "Accuracy by task", tasks.per_task),
    Kind("parameters", "Accuracy against trained parameters", parameters.against_parameters),
    Kind("samples", "Accuracy against training images", samples.against_samples, True),
    Kind("significance", "Significance", significance.matrix),
    Kind("rates", "Learning rate", sensitivity.rates),
    Kind("knobs", "Prompt length and reduction", sensitivity.knobs),
    Kind("cost", "Cost", cost.costs),
)


def of_study(study: Study, lines: Sequence[Line]) -> Iterator[tuple[str, Figure]]:
    """Names and figures of a study, of those for which it has rows.

    Args:
        study: of the results.
        lines: of all curves that were kept.
    """
    for kind in KINDS:
        figure = kind.draw(study.rows if kind.every_size else study.main)
        if figure is not None:
            yield kind.name, figure
    for method in methods_of(searched(study.main)):
        figure = sensitivity.heatmaps([row for row in study.main if row["method"] == method])
        if figure is not None:
            yield f"search-{method}", figure
    figure = losses.by_epoch(curves_of(study, lines))
    if figure is not None:
        yield "losses", figure


def curves_of(study: Study, lines: Sequence[Line]) -> list[Line]:
    """The curves of a study's runs at its main number of training images."""
    wanted = {tuple(row[name] for name in curves.KEY) for row in study.main if row["stage"] == "final"}
    return [line for line in lines if tuple(line[name] for name in curves.KEY) in wanted]


def write(folder: Path) -> list[Path]:
    """Draw everything that a result folder has into FOLDER/figures/STUDY/NAME.svg and .png.

    Raises:
        TableError: a file of the folder is not what it should be, or a figure cannot be written.
    """
    lines = curves.read(folder / curves.FOLDER)
    written = []
    for study in studies(Results(folder / "results.csv").rows()):
        for name, figure in of_study(study, lines):
            written += style.write(figure, folder / FOLDER / study.slug / name)
    return written
