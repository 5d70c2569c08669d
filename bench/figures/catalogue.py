"""Every figure of a result folder: which there are, their names and what they show."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from bench.figures import cost, losses, parameters, samples, sensitivity, significance, style, tasks
from bench.figures.studies import Study, methods_of, searched, slug, studies
from bench.tables import curves, files
from bench.tables.results import Line, Results
from bench.tables.strategies import CURVE

FOLDER = "figures"
# In a study's folder: what its figures were drawn from.
DRAWN = "drawn.json"
_BENCH = Path(__file__).resolve().parents[1]


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
    """Names and figures of a study, of those for which it has rows; each says above what it is of.

    Args:
        study: of the results.
        lines: of all curves that were kept.
    """
    for name, training_set, draw in _drawings(study, lines):
        with style.titled(", ".join(filter(None, (study.title, training_set)))):
            figure = draw()
        if figure is not None:
            yield name, figure


def _drawings(study: Study, lines: Sequence[Line]) -> Iterator[tuple[str, str, Callable[[], Figure | None]]]:
    """Names of a study's figures, the training set of those that are of one, and what draws them."""
    main = study.settings[0]
    for kind in KINDS:
        rows, own = (study.rows, "") if kind.every_size else (study.main, main)
        yield kind.name, own, functools.partial(kind.draw, rows)
    for method in methods_of(searched(study.main)):
        rows = [row for row in study.main if row["method"] == method]
        yield f"search-{method}", main, functools.partial(sensitivity.heatmaps, rows)
    for setting, own in curves_of(study, lines).items():
        name = "losses" if setting == main else f"losses-{slug(setting)}"
        yield name, setting, functools.partial(losses.by_epoch, own)


def curves_of(study: Study, lines: Sequence[Line]) -> dict[str, list[Line]]:
    """The losses of a study's runs by training set: of a method on a task those of the run that was tested after every
    epoch; where there is none, of the final runs."""
    kept: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        kept.setdefault(tuple(line[name] for name in curves.KEY), []).append(line)
    found = {}
    for setting in study.settings:
        by_place: dict[tuple[str, str], dict[str, list[Line]]] = {}
        for row in study.of(setting):
            # A run whose loss was not finite has none.
            own = kept.get(tuple(row[name] for name in curves.KEY))
            if own is not None:
                by_place.setdefault((row["task"], row["method"]), {}).setdefault(row["stage"], []).extend(own)
        own = [line for stages in by_place.values() for line in stages.get(CURVE, stages.get("final", []))]
        if own:
            found[setting] = own
    return found


def write(folder: Path, wanted: Callable[[Study], bool] = lambda study: True) -> list[Path]:
    """Have what a result folder holds drawn, into FOLDER/figures/STUDY/NAME.svg and .png.

    A study whose rows and losses are those that its figures were drawn from is not drawn again.

    Args:
        folder: with results.csv.
        wanted: which of its studies; the files of others stay as they are.

    Returns:
        The figures of the wanted studies, also those that were there.

    Raises:
        TableError: a file of the folder is not what it should be, or a figure cannot be written.
    """
    chosen = [study for study in studies(Results(folder / "results.csv").rows()) if wanted(study)]
    lines = curves.read(folder / curves.FOLDER) if chosen else []
    return [path for study in chosen for path in _up_to_date(study, lines, folder / FOLDER / study.slug)]


def _up_to_date(study: Study, lines: Sequence[Line], folder: Path) -> list[Path]:
    """A study's figures, drawn if they are not those of its rows and losses."""
    made_from = _digest([study.rows, curves_of(study, lines)])
    try:
        noted = json.loads((folder / DRAWN).read_text(encoding="utf-8"))
        known = [folder / name for name in noted["figures"]] if noted["made_from"] == made_from else []
    except (OSError, ValueError, KeyError, TypeError):
        known = []
    if known and all(path.is_file() for path in known):
        return known
    written = [path for name, figure in of_study(study, lines) for path in style.write(figure, folder / name)]
    if written:
        noted = {"made_from": made_from, "figures": [path.name for path in written]}
        files.write(folder / DRAWN, json.dumps(noted, indent=1) + "\n")
    return written


def _digest(drawn: object) -> str:
    """What stands for what is drawn and for how: figures of another version's making are drawn again."""
    return hashlib.sha256(json.dumps([drawn, _makers()]).encode()).hexdigest()


@functools.cache
def _makers() -> tuple[str, ...]:
    """matplotlib's version, and this package's code and the papers' numbers, each file as a digest."""
    own = [*_BENCH.glob("figures/*.py"), *_BENCH.glob("tables/*.py"), *_BENCH.glob("papers/*.csv")]
    return matplotlib.__version__, *(hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(own))
