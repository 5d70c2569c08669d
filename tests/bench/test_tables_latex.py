"""LaTeX of tables: what LaTeX makes of the text, and that no table is wider than the page or taller."""

from __future__ import annotations

import re
import shutil
import subprocess
from itertools import chain
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from bench.offline import tables as offline
from bench.tables import latex
from bench.tables.layout import Entry, Layout
from bench.tables.papers import tables
from bench.tables.results import FIELDS, Results
from bench.tables.spec import View
from bench.tables.tasks import TASKS
from tests.bench.test_tables_vpt import request_of, row_of

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "offline" / "results.csv"
PREAMBLE = r"\documentclass{article}\usepackage{booktabs}\usepackage{graphicx}\begin{document}"


def wide(columns, rows=3, **fields):
    """A table of columns that are about 80 points each."""
    entry = Entry("12.3 ± 0.4", 1.0, "45.6")
    return Layout(
        "Title", ("method", *(f"c{n}" for n in range(columns))), [(f"m{n}", [entry] * columns) for n in range(rows)],
        ["A note."], **fields,
    )  # fmt: skip


def headings(text):
    """The columns of each part."""
    return [line.removesuffix(r" \\").split(" & ")[1:] for line in text.splitlines() if line.startswith("method &")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"a\b_{c}^~", r"a\textbackslash{}b\_\{c\}\textasciicircum{}\textasciitilde{}"),
        ("5% & #1 $2 |x|", r"5\% \& \#1 \$2 \textbar{}x\textbar{}"),
        ("-0.65 to +1.00", r"$-$0.65 to +1.00"),
        ("(-.5) vpt-1, 5e-05 2026-11-22 -", r"($-$.5) vpt-1, 5e-05 2026-11-22 -"),
        ("1 ± 2 <3 → †‡§", r"1 $\pm$ 2 $<$3 $\to$ \dag{}\ddag{}\S{}"),
    ],
)
def test_text_that_latex_would_read_as_its_own(text, expected):
    assert latex.escape(text) == expected


def test_a_name_in_brackets_is_no_part_of_the_row_before():
    table = Layout("T", ("method", "x"), [("one", [Entry("1")]), ("[two]", [Entry("2")]), ("*", [Entry("3")])])
    lines = table.latex().splitlines()
    assert {r"one & 1 \\", r"{}[two] & 2 \\", r"{}* & 3 \\"} <= set(lines)


def test_a_table_that_fits_is_one():
    text = wide(4).latex()
    assert (
        text.count(r"\begin{table}") == 1
        and r"\caption{Title}" in text
        and headings(text) == [["c0", "c1", "c2", "c3"]]
    )


def test_what_is_too_wide_is_several_even_parts_in_their_order():
    text = wide(13).latex()
    found = headings(text)
    assert [*chain(*found)] == [f"c{n}" for n in range(13)] and len(found) == text.count(r"\begin{table}") > 1
    # Six would fit; of three parts none need have more than five.
    assert [len(part) for part in found] == [5, 5, 3]
    assert f"(1 of {len(found)})" in text and f"({len(found)} of {len(found)})" in text
    assert text.count("A note.") == 1 and text.rindex("A note.") > text.rindex(r"\end{tabular}")
    # Every row has as many cells as its tabular has columns.
    for part in text.split(r"\begin{tabular}")[1:]:
        columns = re.match(r"\{(l r*)\}", part.replace("{lr", "{l r"))[1].replace(" ", "")
        assert {line.count("&") for line in part.splitlines() if line.startswith("m")} == {len(columns) - 1}


def test_columns_below_one_heading_stay_together():
    text = wide(8, over=(("first", 2), ("second", 6))).latex()
    assert headings(text) == [["c0", "c1"], [f"c{n}" for n in range(2, 8)]]
    assert r" & \multicolumn{2}{c}{first} \\" in text and r"\cmidrule(lr){2-7}" in text
    # One that is too wide by itself is divided, its heading above both.
    text = wide(12, over=(("first", 2), ("second", 10))).latex()
    assert text.count("{second}") == text.count(r"\begin{table}") > 1
    text = wide(4, over=(("first", 1), ("second", 3))).latex()
    assert r" & \multicolumn{1}{c}{first} & \multicolumn{3}{c}{second} \\" in text
    assert r"\cmidrule(lr){2-2} \cmidrule(lr){3-5}" in text


def test_what_is_too_tall_is_several_parts():
    text = wide(2, rows=90, sections={0: "(a)", 45: "(b)"}).latex()
    names = re.findall(r"^(m\d+) &", text, re.MULTILINE)
    assert names == [f"m{n}" for n in range(90)]
    assert [part.count("\nm") for part in text.split(r"\begin{tabular}")[1:]] == [31, 31, 31]
    assert text.count(r"\emph{(a)}") == text.count(r"\emph{(b)}") == 1


def test_the_best_of_a_divided_table_is_that_of_the_whole():
    table = wide(13)
    table.best_of = "all"
    table.rows[1] = (table.rows[1][0], [Entry("1", 1.0)] * 12 + [Entry("99", 2.0)])
    assert re.findall(r"\\textbf\{(.*?)\}", table.latex()) == ["99"]


def papers_tables(tmp_path):
    """Tables of the papers with rows that are made up: narrow, wide, in sections, below headings."""
    for name in ("vpt-1", "vpt-5", "vpt-10", "vpt-13", "vpt-fig16", "vptft-1", "vptft-fig5"):
        spec = tables()[name]
        tasks = [task for task in TASKS if spec.takes(task)]
        request = request_of(name, tmp_path, tasks)
        lines = [
            row_of(request, role, row, task, seed, f"{0.4 + 0.01 * number + 0.0001 * seed:.6f}")
            for role in request.backbones
            for number, row in enumerate(spec.rows)
            for task in tasks
            for seed in (42, 44)
            if not row.missing
        ]
        if name == "vptft-fig5":
            for task in tasks:
                (tmp_path / task.name).mkdir()
                for file, count in (("train800.txt", 800), ("val200.txt", 200)):
                    (tmp_path / task.name / file).write_text("a.png 0\n" * count)
        view = View(request, [{key: str(line[key]) for key in FIELDS} for line in lines])
        made = spec.lay_out(view)
        parts = made if isinstance(made, list) else [made]
        parts[-1].notes += view.notes()
        yield name, parts


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_takes_the_tables_and_they_fit_its_page(tmp_path):
    there = dict(papers_tables(tmp_path))
    if RESULTS.is_file():
        there |= {f"offline-{name}": [table] for name, table in offline.tables(Results(RESULTS).rows()).items()}
    odd = wide(3)
    odd.rows.append((r"[a\b_{c}^~|", [Entry("-1 ± 2 <3>"), Entry("→ †‡§"), Entry("#$5%")]))
    there["odd"] = [odd]
    for name, parts in there.items():
        body = "\n".join(part.latex() for part in parts)
        (tmp_path / f"{name}.tex").write_text(f"{PREAMBLE}\n{body}\n\\end{{document}}\n", encoding="utf-8")
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", f"{name}.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=120)
        assert done.returncode == 0, (name, done.stdout[-1500:])
        said = (tmp_path / f"{name}.log").read_text(errors="replace")
        for complaint in ("Overfull", "Float too large", "Missing character", "LaTeX Error"):
            assert complaint not in said, (name, complaint)
