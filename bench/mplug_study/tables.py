"""The study's figures by name: what each shows, and the files that are written of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from bench.figures import mplug as figures
from bench.figures import style
from bench.mplug_study import curves, layouts
from bench.mplug_study.corpora import Corpus
from bench.mplug_study.job import Base
from bench.mplug_study.measured import cells, finals, select
from bench.mplug_study.methods import TUNINGS
from bench.mplug_study.protocol import CAPTION, VQA, Protocol
from bench.tables import files
from bench.tables.layout import Layout
from bench.tables.results import Line, Results

_Made = tuple[list[Layout], Figure | None]


@dataclass(frozen=True)
class StudyFigure:
    """A figure of the study.

    Attributes:
        title: where it is in the paper, and what it shows.
        kinds: of the corpora that it is about.
        methods: that it is about; full fine-tuning is beside them where it is asked for.
        make: from a protocol, a corpus, its results and its curves to tables and a figure.
    """

    title: str
    kinds: tuple[str, ...]
    methods: tuple[str, ...]
    make: Callable[[Protocol, Corpus, Sequence[Line], Sequence[Line]], _Made]


def _sweeps(protocol: Protocol, corpus: Corpus, lines: Sequence[Line], progress: Sequence[Line]) -> _Made:
    found, schedule = cells(lines, protocol.seeds), protocol.schedules[corpus.kind]
    tables = [layout(found, protocol, schedule, corpus.name) for layout in (layouts.by_ratio, layouts.by_size)]
    return tables, figures.sweeps(found, protocol, schedule.title)


def _costs(protocol: Protocol, corpus: Corpus, lines: Sequence[Line], progress: Sequence[Line]) -> _Made:
    found, schedule = cells(lines, protocol.seeds), protocol.schedules[corpus.kind]
    table = layouts.by_cost(found, protocol, schedule, corpus.name)
    return [table], figures.costs(found, protocol, schedule.title)


def _over_training(method: str):
    def make(protocol: Protocol, corpus: Corpus, lines: Sequence[Line], progress: Sequence[Line]) -> _Made:
        schedule = protocol.schedules[corpus.kind]
        table = layouts.over_training(progress, method, protocol, schedule, corpus.name)
        return [table], figures.progress(progress, protocol, [method], schedule.title)

    return make


_ALL = tuple(TUNINGS)
FIGURES = {
    "mplug-fig3": StudyFigure("mPLUG study, Fig. 3: captions", (CAPTION,), _ALL, _sweeps),
    "mplug-fig4": StudyFigure("mPLUG study, Fig. 4: questions", (VQA,), _ALL, _sweeps),
    "mplug-fig5": StudyFigure("mPLUG study, Fig. 5: score against cost", (CAPTION, VQA), _ALL, _costs),
    **{
        f"mplug-fig{number}": StudyFigure(
            f"mPLUG study, Fig. {number}: {TUNINGS[name].title} on validation as it trains",
            (CAPTION,),
            (name,),
            _over_training(name),
        )
        for number, name in enumerate(("prompt", "prefix", "lora", "serial", "parallel"), start=6)
    },
}


def write(
    name: str, results: Results, corpora: Sequence[Corpus], base: Base, protocol: Protocol, out: Path
) -> list[Layout]:
    """Write OUT/NAME.md and .tex, and OUT/figures/NAME-CORPUS.svg and .png, of what is in the results.

    Args:
        name: of `FIGURES`.
        results: of the study.
        corpora: that it is written for, those of the figure's kinds.
        base: the model.
        protocol: of the runs.
        out: folder.

    Returns:
        The tables.

    Raises:
        TableError: results or curves cannot be read, or a file cannot be written.
    """
    spec, tables = FIGURES[name], []
    # Runs of other protocols or models are never mixed in.
    where = {"backbone": base.name, "image_size": base.fields.get("image_size", "")}
    rows, progress = results.rows(), curves.read(out / curves.FOLDER)
    for corpus in corpora:
        if corpus.kind not in spec.kinds:
            continue
        about = {"task": corpus.name, "protocol": protocol.named(corpus.kind), **where}
        made, figure = spec.make(protocol, corpus, select(rows, **about), select(progress, **about))
        lost = layouts.lost(finals(select(rows, **about), protocol.seeds), protocol)
        if made and lost:
            made[-1].notes.append(lost)
        for table in made:
            table.title = f"{spec.title}. {table.title}"
        if figure is not None:
            style.write(figure, out / "figures" / f"{name}-{corpus.name}")
        tables += made
    if tables:
        tables[-1].notes.append(f"{base.name}. Protocol: {protocol.described}.")
    files.write(out / f"{name}.md", "\n".join(table.markdown() for table in tables))
    files.write(out / f"{name}.tex", "\n".join(table.latex() for table in tables))
    return tables
