"""The page: everything that a result folder holds, laid out by a template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from bench.figures import catalogue, cost, losses, parameters, samples, sensitivity, significance, tasks
from bench.figures.studies import Study, base_task, methods_of, searched, studies, tasks_of
from bench.report import documents, pictures, summary
from bench.tables import curves
from bench.tables.errors import TableError
from bench.tables.results import Line, Results

_TEMPLATES = Path(__file__).with_name("templates")
# A picture of more bytes than this is named and not shown: a page is to be opened and sent.
_LARGEST = 4 * 2**20


@dataclass(frozen=True)
class Panel:
    """Pictures that belong together.

    Attributes:
        title: above them; "" if the section's is enough.
        figures: SVG elements.
        folded: whether they open on request.
    """

    title: str
    figures: list[Markup]
    folded: bool = False


@dataclass(frozen=True)
class StudyPart:
    """What the page says of a study.

    Attributes:
        anchor: of its section.
        figures: panels by the name of their section.
        others: what `bench.report.summary` finds.
    """

    anchor: str
    study: Study
    facts: dict[str, str]
    cautions: list[str]
    gaps: list[str]
    failures: list[summary.Failure]
    outcomes: list[summary.Outcome]
    costs: list[summary.Cost]
    figures: dict[str, list[Panel]]


@dataclass(frozen=True)
class Picture:
    """A file of the folder.

    Attributes:
        name: within it.
        address: that holds it, or "" for one that is too large.
    """

    name: str
    address: str


def build(folder: Path, title: str) -> str:
    """The page's HTML.

    Args:
        folder: with results.csv, and whatever else the commands wrote there.
        title: of the page.

    Raises:
        TableError: there are no results, or a file is not what it should be.
    """
    results = Results(folder / "results.csv")
    if not results.path.is_file():
        raise TableError(f"{results.path}: no such file; DIR is the --out of python -m bench.tables")
    rows = results.rows()
    if not rows:
        raise TableError(f"{results.path}: no run is in it yet")
    lines = curves.read(folder / curves.FOLDER)
    files = [documents.read(path) for path in sorted(folder.glob("*.md"))]
    parts = [_study(study, f"s{number}", lines) for number, study in enumerate(studies(rows), start=1)]
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["leading"] = documents.leading
    environment.tests["table"] = lambda part: isinstance(part, documents.TablePart)
    page = environment.get_template("page.html").render(
        title=title,
        style=Markup(_text("page.css")),
        script=Markup(_text("page.js")),
        colours=pictures.colours(),
        parts=parts,
        tables=[file for file in files if file.has_tables],
        notes=[file for file in files if not file.has_tables],
        pictures=_pictures(folder, [part.study for part in parts]),
        folder=folder.name or folder.resolve().name,
    )
    return "\n".join(line.rstrip() for line in page.splitlines() if line.strip()) + "\n"


def _text(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _study(study: Study, anchor: str, lines: Sequence[Line]) -> StudyPart:
    drawn = {name: list(panels) for name, panels in _figures(study, anchor, lines)}
    return StudyPart(
        anchor, study, summary.facts(study), summary.cautions(study), summary.gaps(study), summary.failures(study),
        summary.outcomes(study), summary.costs(study), {name: panels for name, panels in drawn.items() if panels},
    )  # fmt: skip


def _figures(study: Study, anchor: str, lines: Sequence[Line]) -> Iterator[tuple[str, list[Panel]]]:
    """Panels by section. Of figures with a panel a task each is drawn alone, so that a narrow page can stack them."""
    rows = study.main

    def show(figure, name: str, label: str) -> list[Markup]:
        return [] if figure is None else [pictures.inline(figure, f"{anchor}-{name}", label)]

    def each(draw, own: Sequence[Line], name: str, label: str) -> list[Markup]:
        found = []
        for task in tasks_of(own):
            found += show(draw([row for row in own if row["task"] == task]), f"{name}-{task}", f"{label}: {task}")
        return found

    def panel(figures: list[Markup], title: str = "", folded: bool = False) -> list[Panel]:
        return [Panel(title, figures, folded)] if figures else []

    methods = methods_of(rows)
    yield "tasks", panel(each(lambda own: tasks.per_task(own, methods), rows, "tasks", "test accuracy by method"))
    label = "test accuracy against trained parameters"
    yield "parameters", panel(show(parameters.against_parameters(rows), "parameters", label))
    scales: list[Markup] = []
    for task in dict.fromkeys(base_task(row) for row in study.rows):
        own = [row for row in study.rows if base_task(row) == task]
        scales += show(samples.against_samples(own), f"samples-{task}", f"test accuracy by training images: {task}")
    yield "samples", panel(scales)
    yield "losses", panel(each(losses.by_epoch, catalogue.curves_of(study, lines), "losses", "loss by epoch"))
    yield "significance", panel(show(significance.matrix(rows), "significance", "p-values, method against method"))
    yield "cost", panel(show(cost.costs(rows), "cost", "time and memory by method"))
    search = panel(show(sensitivity.rates(rows), "rates", "points behind the best by learning rate"))
    search += panel(each(sensitivity.knobs, rows, "knobs", "validation accuracy"), "Prompt length and reduction", True)
    for method in methods_of(searched(rows)):
        own = [row for row in rows if row["method"] == method]
        search += panel(each(sensitivity.heatmaps, own, f"search-{method}", f"search of {method}"), method, True)
    yield "search", search


def _pictures(folder: Path, own: Sequence[Study]) -> list[Picture]:
    """Pictures of the folder that other commands put there, of two formats the SVG."""
    drawn = {study.slug for study in own}
    found: dict[Path, Path] = {}
    for path in sorted([*folder.glob("*"), *(folder / catalogue.FOLDER).rglob("*")]):
        inside = path.relative_to(folder)
        ours = inside.parts[0] == catalogue.FOLDER and len(inside.parts) > 2 and inside.parts[1] in drawn
        if path.suffix.lower() in pictures.SUFFIXES and path.is_file() and not ours:
            known = found.get(inside.with_suffix(""))
            if known is None or (path.suffix == ".svg" and path.stat().st_size <= _LARGEST):
                found[inside.with_suffix("")] = path
    return [
        Picture(str(path.relative_to(folder)), pictures.data_uri(path) if path.stat().st_size <= _LARGEST else "")
        for path in found.values()
    ]
