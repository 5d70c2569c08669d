"""The page of a result folder: all of it is there, nothing is fetched, nothing that a file says becomes markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

pytest.importorskip("optuna")
pytest.importorskip("jinja2")
pytest.importorskip("markdown_it")

from bench.figures import tasks
from bench.figures.studies import studies
from bench.report import documents, pictures, plots, summary
from bench.report.__main__ import main
from bench.report.page import build
from bench.tables import cells
from bench.tables.ensemble import STAGE
from bench.tables.errors import TableError
from bench.tables.layout import Entry, Layout
from bench.tables.strategies import CURVE
from tests.bench.made_results import made_rows, write_results

ROWS = made_rows()
VOID = {"meta", "input", "img", "br", "hr", "link"}
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
)


class Page(HTMLParser):
    """Reads a page: elements that are left open, identifiers, addresses, text by element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.ids, self.addresses, self.tags = [], [], [], []
        self.cells: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href", "action", "srcset", "data"):
                self.addresses.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and {"td", "th"} & set(self.open):
            self.cells[-1][-1] += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A result folder with a table, a note and pictures of other commands, and a page of it."""
    root = tmp_path_factory.mktemp("results")
    write_results(root, ROWS)
    table = Layout("VPT, Table 1. A & <b>", ("method", "natural", "other"))
    table.rows.append(("full", [Entry("62.5 ± 0.4 [1]", 62.5, "75.88"), Entry("1.2e-05")]))
    table.rows.append(("sidetune (not in the library)", [Entry(paper="58.21?"), Entry()]))
    table.notes.append("A note with <script>alert(1)</script>.")
    (root / "vpt-1.md").write_text(table.markdown())
    (root / "vpt-1.tex").write_text(table.latex())
    note = (
        "# What\n\nIt *was* so. ![a](made.png) ![b](https://x.org/y.png) ![c](../made.png) [d](javascript:alert(1))\n"
    )
    (root / "what.md").write_text(note)
    (root / "made.png").write_bytes(PIXEL)
    (root / "figures").mkdir()
    (root / "figures" / "look.png").write_bytes(PIXEL)
    (root / "figures" / "vit-b-random-32-quick-4").mkdir()
    (root / "figures" / "vit-b-random-32-quick-4" / "tasks.png").write_bytes(PIXEL)
    return root


@pytest.fixture(scope="module")
def text(folder):
    """The page's HTML."""
    return build(folder, "Results")


def test_the_page_is_whole_and_stands_alone(text):
    page = Page(text)
    assert page.open == [] and "html" in page.tags
    assert len(page.ids) == len(set(page.ids))
    for address in page.addresses:
        inside = address.startswith("#") and address[1:] in page.ids
        assert inside or address.startswith("data:image/"), address
    assert not re.findall(r"url\((?!#)|@import|<link|<iframe|<script src", text)
    for reference in re.findall(r"url\(#([^)]+)\)", text):
        assert reference in page.ids
    assert "default-src 'none'" in text
    # Figures, tables, and the words of both.
    for words in ("Overview", "Missing and failed", "Significance", "The search", "Cost", "LaTeX of vpt-1", "look.png"):
        assert words in page.text, words
    assert page.text.count("test accuracy, %") >= 3 and "tasks.png" not in page.text


def test_what_files_say_is_never_markup(text):
    page = Page(text)
    assert page.tags.count("script") == 1 and "alert(1)" in page.text
    assert "A & <b>" in page.text and "javascript:" not in "".join(page.addresses)
    # A picture of the folder is shown, of any other place there are the words alone.
    assert text.count("data:image/png") == 3 and "https://x.org" not in text and "b c" in page.text


def test_names_in_the_results_are_never_markup(tmp_path):
    rows = [row | {"task": "<i>t</i>", "backbone": '"><img src=x onerror=alert(1)>'} for row in ROWS]
    write_results(tmp_path, [row for row in rows if row["method"] == "linear"][:6])
    page = Page(build(tmp_path, "<u>"))
    assert "i" not in page.tags and "u" not in page.tags and "img" not in page.tags and page.open == []
    assert "<i>t</i>" in page.text


def test_the_same_folder_gives_the_same_page(folder, text, tmp_path):
    assert main([str(folder), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text() == text
    assert not re.search(r"matplotlib|\d\d:\d\d:\d\d", text, re.IGNORECASE)


def test_a_quick_protocol_is_said_first(text):
    page = Page(text)
    said = "Quick protocol: a thinned grid and 4 epochs."
    assert said in page.text and page.text.index(said) < page.text.index("Overview")
    rows = [row | {"protocol": name} for name in ("paper-100", "paper-3", "mine-5") for row in ROWS]
    paper, short, own = studies(rows)
    assert summary.cautions(paper) == []
    assert summary.cautions(short) == ["3 epochs instead of the paper's 100."]
    assert summary.cautions(own)[0] == "'mine-5' is a protocol of its own, not the paper's."
    # full 4 of 16, linear 4 of 40, vpt-deep 8 of 240.
    assert summary.cautions(own)[1] == "4 to 8 settings were tried for a method; the paper's grids have 16 to 240."


def test_what_is_missing_and_what_failed():
    (study,) = studies(ROWS)
    said = "\n".join(summary.gaps(study))
    assert "Tasks of VTAB-1k without a run: caltech101, dtd," in said and "cifar100," not in said
    assert "Methods that the library lacks: sidetune." in said
    assert "Methods of the paper's tables without a run: partial-1, mlp-3, bias, adapter, vpt-shallow." in said
    assert "full: fewer seeds than elsewhere on eurosat (2 of 3)." in said
    failure, final = summary.failures(study)
    assert (failure.method, failure.stage, failure.count, failure.runs) == ("full", "search", 2, 16)
    assert failure.where == "1 (2)"
    assert (final.method, final.stage, final.count, final.where) == ("linear", "final", 1, "svhn seed 82")
    less = [
        row for row in ROWS if not (row["task"] == "svhn" and row["method"] == "linear" and row["stage"] == "final")
    ]
    less = [row for row in less if not (row["task"] == "eurosat" and row["method"] == "linear")]
    less.remove(next(row for row in less if row["task"] == "cifar100" and row["method"] == "vpt-deep"))
    said = "\n".join(summary.gaps(studies(less)[0]))
    assert "linear: no run on eurosat." in said and "linear: searched, not yet tested on svhn." in said
    assert "vpt-deep: fewer settings tried than elsewhere on cifar100 (7 of 8)." in said


def test_curves_and_ensembles_that_failed():
    """Runs of the stages that only some tables have."""
    lost = {"accuracy": "0", "trained_parameters": ""}
    final = next(row for row in ROWS if row["stage"] == "final" and row["method"] == "vpt-deep")
    curve, ensemble = final | {"stage": CURVE}, final | {"stage": STAGE, "point": "base_lr=1;length=10;members=3"}
    other = ensemble | {"task": "svhn", "setting": "n_train=400"}
    (study,) = studies([*ROWS, curve | lost, ensemble, other | lost])
    first, second = summary.failures(study)[2:]
    assert (first.method, first.stage, first.count, first.runs) == ("vpt-deep", "curve", 1, 1)
    assert first.where == "cifar100 seed 42"
    assert (second.stage, second.count, second.runs, second.where) == ("ensemble", 1, 2, "svhn n_train=400 3 members")
    assert [one.stage for one in summary.failures(studies([*ROWS, curve, ensemble])[0])] == ["search", "final"]


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without their figures, which take most of the time."""
    monkeypatch.setattr(plots, "of_study", lambda *_: {})


@pytest.mark.usefixtures("undrawn")
def test_failures_of_every_stage_are_on_the_page(tmp_path):
    lost = {"accuracy": "0", "trained_parameters": ""}
    final = next(row for row in ROWS if row["stage"] == "final" and row["method"] == "vpt-deep")
    rows = [*ROWS, final | lost | {"stage": CURVE}, final | lost | {"stage": STAGE, "point": "base_lr=1;members=3"}]
    write_results(tmp_path, rows)
    page = Page(build(tmp_path, "title"))
    listed = [[cell.strip() for cell in row] for row in page.cells]
    assert ["vpt-deep", "curve", "1", "1", "cifar100 seed 42"] in listed
    assert ["vpt-deep", "ensemble", "1", "1", "cifar100 3 members"] in listed
    assert "Curve: a run that is tested after every epoch" in page.text and "Ensemble: runs that" in page.text
    write_results(tmp_path, ROWS)
    assert "Ensemble: runs that" not in Page(build(tmp_path, "title")).text


def test_marks_of_the_papers_numbers_are_explained_where_they_stand():
    assert summary.papers_marks(["78.8", "", "-"]) == ""
    assert summary.papers_marks(["78.8?", "1"]) == "Behind a number of the paper's: ? where its reading is uncertain."
    said = summary.papers_marks(["78.8§", "1?"])
    assert said.endswith(" ? where its reading is uncertain, § where it is not the one in the paper's text.")


@pytest.mark.parametrize("mark, note", [("", "extra-digit"), ("?", "ocr-suspect")])
@pytest.mark.usefixtures("undrawn")
def test_the_list_of_runs_explains_its_marks(tmp_path, monkeypatch, mark, note):
    printed = cells.Cell(78.8, note)
    monkeypatch.setattr(cells, "cell", lambda file, **where: printed if file == "vpt_table13" else None)
    write_results(tmp_path, ROWS)
    page = Page(build(tmp_path, "title"))
    assert any(f"78.8{mark}" in row for row in page.cells)
    section = page.text.rpartition("Every method on every task")[2]
    assert ("Behind a number of the paper's: ? where its reading is uncertain." in section) == bool(mark)


def test_facts_outcomes_and_costs():
    (study,) = studies(ROWS)
    facts = summary.facts(study)
    assert facts["tasks"] == "3 of VTAB-1k's 19, 1 more" and facts["runs"] == "64 in the search, 35 final"
    assert facts["date"] == "2026-01-01 to 2026-01-04" and facts["training images"] == "400, 480, 800, 1,000"
    found = {(one.task, one.method): one for one in summary.outcomes(study)}
    one = found["cifar100", "vpt-deep"]
    assert (one.mean, one.deviation, one.seeds) == (pytest.approx(63), pytest.approx(3), 3)
    assert (one.paper, one.validation, one.trained) == ("78.8", pytest.approx(73.1), 50)
    assert one.setting == "base_lr=1, length=10, weight_decay=0.001" and (one.images, one.size) == ("", "1,000")
    # A run that did not say how many images, and one whose loss was not finite, are in their mean and no others.
    assert (found["cifar100", "full"].seeds, found["cifar100", "full"].size) == (3, "")
    assert (found["svhn", "linear"].seeds, found["svhn", "linear"].mean) == (3, pytest.approx((55 + 57) / 3))
    # The paper's number is of the task, not of a draw of it.
    assert found["cifar100-400", "vpt-deep"].paper == ""
    full = summary.costs(study)[0]
    assert (full.trained, full.ms, full.memory, full.paper) == ("1,000", "2.5", "100", "358.7 / 11.7")
    assert full.seconds == "61 (60 to 62)" and full.saved == ""


@pytest.mark.parametrize(
    "points, paper",
    [
        (["length=200"] * 3, "360.1 / 25.8"),
        (["length=1"] * 3, "213.6 / 10.3"),
        (["length=10"] * 3, ""),
        # Of tasks with different lengths the paper has no number.
        (["length=1", "length=200", "length=200"], ""),
    ],
)
def test_the_papers_cost_is_that_of_the_same_setting(points, paper):
    deep = [row for row in ROWS if row["method"] == "vpt-deep" and row["stage"] == "final" and row["seed"] == "42"]
    rows = [row | {"point": point} for row, point in zip(deep[:3], points, strict=True)]
    (found,) = summary.costs(studies(rows)[0])
    assert found.paper == paper


def test_two_settings_of_one_seed_are_refused(tmp_path, capsys):
    row = next(row for row in ROWS if row["method"] == "vpt-deep" and row["stage"] == "final")
    write_results(tmp_path, [*ROWS, row | {"point": "base_lr=2", "accuracy": "0.9"}])
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "two runs of vpt-deep on cifar100 have the seed 42" in error and error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_outcomes_of_other_training_sets():
    other = [row | {"setting": "n_train=5000", "train_size": "6250"} for row in ROWS if row["task"] == "svhn"]
    (study,) = studies(ROWS + other)
    plain, own = (one for one in summary.outcomes(study) if (one.task, one.method) == ("svhn", "vpt-deep"))
    assert (plain.images, plain.size, plain.seeds, plain.paper != "") == ("", "1,000", 3, True)
    assert (own.images, own.size, own.seeds, own.paper) == ("n_train=5000", "6,250", 3, "")
    assert own.validation == pytest.approx(73.1)
    assert summary.failures(study)[-1].where == "svhn seed 82, svhn n_train=5000 seed 82"
    assert len(study.main) == len(ROWS) - sum(row["task"] == "cifar100-400" for row in ROWS)


def test_a_table_is_taken_apart(folder):
    document = documents.read(folder / "vpt-1.md")
    (table,) = document.parts
    assert document.title == "VPT, Table 1. A & <b>" and document.latex.startswith(r"\begin{table}")
    full, sidetune = table.rows
    assert (full[1].content, full[1].paper, full[1].order) == ("62.5 ± 0.4 [1]", "75.88", "62.5")
    assert full[2].order == "1.2e-05" and not full[2].paper
    # What stands in brackets behind a row's name is no number.
    assert sidetune[0].content == "sidetune (not in the library)" and sidetune[1].paper == "58.21?"
    assert sidetune[1].order == "" and table.compared and len(table.notes) == 1


def test_sections_and_several_tables_in_a_file(tmp_path):
    (tmp_path / "a.md").write_text(
        "### One\n\n| a | b |\n|---|---|\n| *upper* | |\n| x | **1** |\n\nnote\n\n"
        "### Two\n\n| a | b |\n|---|---|\n| y | 2 |\n"
    )
    one, two = documents.read(tmp_path / "a.md").parts
    assert (one.title, two.title) == ("One", "Two") and len(one.notes) == 1
    assert [len(row) for row in one.rows] == [1, 2] and one.rows[1][1].best and not two.rows[0][1].best
    write_results(tmp_path, ROWS[:20])
    assert '<th scope="rowgroup" colspan="2"><em>upper</em></th>' in build(tmp_path, "x")


def test_figures_take_the_readers_colours_and_share_no_names():
    (study,) = studies(ROWS)
    one, other = (pictures.inline(tasks.per_task(study.main), name, "by <task>") for name in ("one", "other"))
    assert "var(--ink)" in one and "var(--c8)" in one and "#1f6fb4" not in one
    assert 'aria-label="by &lt;task&gt;"' in one and "<style" not in one and "<metadata" not in one
    ids = [set(re.findall(r'id="([^"]+)"', text)) for text in (one, other)]
    assert ids[0] and not ids[0] & ids[1]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, r"results.csv: no such file; DIR is the --out of python -m bench.tables"),
        ("", "results.csv: no run is in it yet"),
        ("a,b\n1,2\n", "results.csv: its columns are not those of a result file"),
    ],
)
def test_folders_without_results(content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / "results.csv").write_text(content)
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "report.html").exists()


def test_a_note_that_is_no_text(tmp_path):
    (tmp_path / "a.md").write_bytes(b"\xff\xfe")
    with pytest.raises(TableError, match=r"a\.md: cannot be read"):
        documents.read(tmp_path / "a.md")


def test_a_picture_that_is_too_large_is_named(tmp_path, monkeypatch):
    from bench.report import page

    write_results(tmp_path, ROWS[:20])
    (tmp_path / "large.png").write_bytes(PIXEL)
    monkeypatch.setattr(page, "_LARGEST", 10)
    text = build(tmp_path, "x")
    assert "large.png: too large for this page" in text and "data:image" not in text.replace("img-src data:", "")
