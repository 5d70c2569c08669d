"""The page of the offline study: its numbers are the results'."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("optuna")

from bench.offline import page, plan
from bench.tables.errors import TableError
from bench.tables.results import FIELDS, Results

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "offline" / "results.csv"


def row(method: str, accuracy: float, seed: int = 42, task: str = "mnist", protocol=plan.USUAL) -> dict[str, str]:
    values = dict.fromkeys(FIELDS, "") | {
        "task": task, "method": method, "stage": "final", "seed": str(seed), "backbone": str(plan.BACKBONE),
        "image_size": "112", "protocol": protocol.name, "point": "base_lr=1", "accuracy": str(accuracy),
        "seconds": "90", "trained_parameters": "12345", "backbone_parameters": "99999",
    }  # fmt: skip
    return values


ROWS = [
    row("vpt-deep", 0.5), row("vpt-deep", 0.52, 44), row("full", 0.6),
    row("full", 0.25, task=plan.ONE_SHOT_TASK, protocol=plan.ONE_SHOT),
]  # fmt: skip


@pytest.mark.parametrize(
    "what, value",
    [
        ("mean mnist vpt-deep", "51.0"),
        ("mean mnist lora", "-"),
        ("gap mnist vpt-deep full", "\N{MINUS SIGN}9.0"),
        ("gap mnist full vpt-deep", "+9.0"),
        ("gap mnist full lora", "-"),
        (f"mean {plan.ONE_SHOT_TASK} full", "25.0"),
        ("trained mnist vpt-deep", "12,345"),
        ("runs", "4"),
        ("minutes", "6"),
        ("paper vpt_table13 method=vpt-deep task=cifar100 metric=accuracy", "78.8"),
    ],
)
def test_a_mark(what, value):
    assert page.fill(f"a <!--={what}-->old\nold<!--/--> b", ROWS) == f"a <!--={what}-->{value}<!--/--> b"


def test_a_table():
    filled = page.fill("<!--=table methods--><!--/-->", ROWS)
    assert "| vpt-deep | 12,345 |" in filled and "51.0 ± 1.4" in filled and page.fill(filled, ROWS) == filled


@pytest.mark.parametrize(
    "text, message",
    [
        ("<!--=meen mnist full--><!--/-->", "unknown mark 'meen'; did you mean 'mean'?"),
        ("<!--=mean mnits full--><!--/-->", "unknown task 'mnits'; did you mean 'mnist'?"),
        ("<!--=mean mnist ful--><!--/-->", "unknown method 'ful'; did you mean 'full'?"),
        ("<!--=table method--><!--/-->", "unknown table 'method'; did you mean 'methods'?"),
        ("<!--=mean mnist--><!--/-->", "wrong number of words after 'mean'"),
        ("<!--=runs--> and no end", "has no <!--/--> after it"),
        ("<!--=paper vpt_table13 method=x--><!--/-->", "has no row with method=x"),
    ],
)
def test_a_mark_that_is_wrong(text, message):
    with pytest.raises(TableError, match=message.replace("?", r"\?")):
        page.fill(text, ROWS)


def test_the_command(tmp_path, capsys):
    (tmp_path / "page.md").write_text("<!--=runs-->9<!--/-->")
    results = Results(tmp_path / "results.csv")
    results.add(ROWS[0])
    assert page.main([str(tmp_path / "page.md"), str(tmp_path)]) == 0
    assert (tmp_path / "page.md").read_text() == "<!--=runs-->1<!--/-->"
    assert page.main([str(tmp_path / "none.md"), str(tmp_path)]) == 2
    assert "none.md" in capsys.readouterr().err


@pytest.mark.skipif(not RESULTS.is_file(), reason="no results are kept here")
def test_the_page_and_the_tables_say_what_the_results_say():
    rows = Results(RESULTS).rows()
    text = (ROOT / "docs" / "offline-study.md").read_text(encoding="utf-8")
    assert page.fill(text, rows) == text, "python -m bench.offline.page docs/offline-study.md bench/results/offline"
    from bench.offline import tables

    for name, table in tables.tables(rows).items():
        assert RESULTS.with_name(f"{name}.md").read_text(encoding="utf-8") == table.markdown()
        assert RESULTS.with_name(f"{name}.tex").read_text(encoding="utf-8") == table.latex()
