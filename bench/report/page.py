"""The page: everything that a result folder holds, laid out by a template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from bench.figures import catalogue
from bench.figures.studies import Study, studies
from bench.report import documents, pictures, plots, summary
from bench.tables import curves
from bench.tables.errors import TableError
from bench.tables.results import Line, Results

_TEMPLATES = Path(__file__).with_name("templates")
# A picture of more bytes than this is named and not shown: a page is to be opened and sent.
_LARGEST = 4 * 2**20


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
    figures: dict[str, list[plots.Panel]]


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
    environment.filters["marks"] = summary.papers_marks
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
    return StudyPart(
        anchor, study, summary.facts(study), summary.cautions(study), summary.gaps(study), summary.failures(study),
        summary.outcomes(study), summary.costs(study), plots.of_study(study, anchor, lines),
    )  # fmt: skip


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
