"""The papers' tables: names, grids, results that survive, statistics, layout."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import os

import pytest
import torch

pytest.importorskip("optuna")

from bench.tables import cells, statistics, study
from bench.tables.__main__ import main
from bench.tables.errors import TableError
from bench.tables.job import Backbone, Job
from bench.tables.layout import Entry, Layout
from bench.tables.measured import Measured, collect, total_parameters, wins
from bench.tables.protocol import ROWS, SEEDS, Protocol, batch_size, best, method
from bench.tables.results import CLASSIFICATION, FIELDS, KEY, LATER, Results, point_of, point_text
from bench.tables.tasks import TASKS, find
from fastpeft.data import DataError
from fastpeft.trainer import memory

PAPER = Protocol.of("vit_base_patch16_224", quick=False, seeds=5)


def line(**values) -> dict[str, object]:
    row = dict.fromkeys(FIELDS, "")
    return row | {"task": "svhn", "method": "full", "stage": "final", "seed": 42, "accuracy": 0.5} | values


def test_the_papers_grids():
    grid = {name: list(PAPER.grid(row)) for name, row in ROWS.items()}
    assert len(grid["full"]) == 16 and len(grid["linear"]) == 40
    assert len(grid["vpt-deep"]) == 240 and len(grid["vpt-shallow"]) == 336 and len(grid["adapter"]) == 48
    assert grid["linear"][0] == {"base_lr": 50.0, "weight_decay": 0.01}
    assert PAPER.epochs == 100 and PAPER.warmup_epochs == 10 and PAPER.seeds == SEEDS
    assert Protocol.of("vit_huge_patch14_224", False, 5).epochs == 50
    assert Protocol.of("x", True, 7).seeds == (*SEEDS, 801, 802)
    assert batch_size(ROWS["vpt-deep"], {"length": 100}) == 64 and batch_size(ROWS["vpt-deep"], {"length": 50}) == 128
    assert method(ROWS["vpt-shallow"], {"length": 5}) == {"name": "vpt", "deep": False, "length": 5}


def test_equals_go_to_the_smaller_rate():
    points = [({"base_lr": rate}, score) for rate, score in ((5.0, 0.8), (1.0, 0.8), (0.1, 0.7))]
    assert best(points) == {"base_lr": 1.0}


def test_every_row_has_the_papers_cells():
    for name in ROWS:
        assert cells.cell("vpt_table01", method=name, task="group_mean", group="natural", metric="accuracy").value > 50
    assert cells.cell("vpt_table13", method="vpt-deep", task="cifar100", metric="accuracy").value == 78.8
    for task in TASKS:
        table = "vpt_table14" if task.group == "fgvc" else "vpt_table13"
        assert cells.cell(table, method="full", task=task.name, metric="accuracy") is not None, task
    assert str(cells.cell("vpt_table13", method="mlp-2", task="cifar100", metric="accuracy")).endswith("?")
    assert cells.cell("vpt_table13", method="none") is None


def test_every_note_of_the_papers_cells_is_explained_and_marked_as_it_says():
    explained = {}
    for line in (cells.FOLDER / "README.md").read_text().splitlines():
        columns = [column.strip() for column in line.strip("|").split("|")]
        if line.startswith("| ") and len(columns) == 3 and columns[0] != "note":
            explained[columns[0].strip("`").replace("empty", "")] = columns[2].strip("`").replace("no number", "")
    assert explained == cells.MARKS
    seen = set()
    for path in cells.FOLDER.glob("*.csv"):
        for row in cells._rows(path.stem):
            seen.add(row["note"])
            assert row["value"] or row["note"] in ("ocr-missing", "not-reported"), (path.name, row)
    assert seen <= set(cells.MARKS)
    corrected = cells.cell("vpt_table13", method="vpt-deep", task="eurosat", metric="accuracy")
    assert str(corrected) == "96.1§" and corrected.said("{:.2f}") == "96.10§"
    share = cells.cell("vpt_table13", method="vpt-shallow", task="smallnorb_elevation", metric="tuned_over_total")
    assert share.note == "filled" and str(share) == "0.19§"
    assert str(cells.cell("vpt_or_ft_table05", method="ft", setting="n_train=5000", task="dtd")) == "-"


def test_points_are_read_as_they_are_written():
    for point in PAPER.grid(ROWS["vpt-shallow"]):
        assert point_of(point_text(point)) == point


def test_a_row_is_kept_once_and_whole(tmp_path):
    results = Results(tmp_path / "deep" / "results.csv")
    assert results.rows() == []
    results.add(line())
    results.add(line(accuracy=0.9))
    results.add(line(seed=44, point="base_lr=1;weight_decay=0"))
    assert [row["accuracy"] for row in results.rows()] == ["0.5", "0.5"]
    assert results.has(task="svhn", seed=44) and not results.has(seed=82)


def test_a_file_is_read_once_until_it_changes(tmp_path, monkeypatch):
    read, parsed = [], Results._parsed
    monkeypatch.setattr(Results, "_parsed", lambda self: read.append(self) or parsed(self))
    results, other = Results(tmp_path / "results.csv"), Results(tmp_path / "results.csv")
    rows = [dict.fromkeys(FIELDS, "1") | {"seed": str(seed), "point": ""} for seed in range(20)]
    for row in rows:
        other.add(row)
    read.clear()
    for row in rows:
        assert results.find(**{name: row[name] for name in KEY}) == row and results.has(seed=row["seed"])
    results.rows()[0]["accuracy"] = "2"
    assert results.rows() == rows and len(read) == 1
    other.add(rows[0] | {"seed": "20"})
    assert results.has(seed="20") and len(results.rows()) == 21
    (tmp_path / "results.csv").unlink()
    assert results.rows() == [] and not results.has(seed="20")


def test_the_beginning_of_a_line_that_a_killed_process_left(tmp_path):
    results = Results(tmp_path / "results.csv")
    results.add(line())
    whole = results.path.read_bytes()
    for cut in range(len(whole.splitlines(keepends=True)[0]) + 1, len(whole)):
        results.path.write_bytes(whole[:cut])
        assert results.rows() == []
        results.add(line())
        assert results.path.read_bytes() == whole


def test_a_file_of_something_else(tmp_path):
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(TableError, match=r"results\.csv: its columns are not those"):
        Results(tmp_path / "results.csv").rows()
    (tmp_path / "other.csv").write_text(",".join(FIELDS) + "\nsvhn,full\n")
    with pytest.raises(TableError, match=r"other\.csv:2: expected 21 fields"):
        Results(tmp_path / "other.csv").rows()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"accuracy": "abc"}, "accuracy: expected a number, got 'abc'"),
        ({"seed": "x"}, "seed: expected a whole number, got 'x'"),
        ({"point": "base_lr"}, "point: expected settings as name=number;name=number, got 'base_lr'"),
        ({"method": "b\udcffd"}, "not text in UTF-8"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_value_that_is_none_is_one_line(tmp_path, values, message):
    Results(tmp_path / "results.csv").add(line())
    with (tmp_path / "results.csv").open("a", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.DictWriter(file, FIELDS, lineterminator="\n").writerow(line(seed=7) | values)
    with pytest.raises(TableError, match=rf"results\.csv:3: {message}; repair or remove the line"):
        Results(tmp_path / "results.csv").rows()


@pytest.mark.parametrize("room, earlier", [(0, False), (1, False), (30, False), (0, True), (1, True)])
def test_a_disk_that_takes_a_part_of_a_row_is_one_line(tmp_path, room, earlier):
    results = Results(tmp_path / "results.csv")
    results.add(line())
    if earlier:
        head, row = results.path.read_text().splitlines()
        results.path.write_text(head.removesuffix(",date") + "\n" + row.removesuffix(",") + "\n")
        results = Results(results.path, dataclasses.replace(CLASSIFICATION, later=(*LATER, "date")))
    before = results.path.read_bytes()
    with no_file_larger(len(before) + room), pytest.raises(TableError, match="cannot be written: File too large"):
        results.add(line(seed=44))
    assert results.path.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [".results.csv.lock", "results.csv"]
    results.add(line(seed=44))
    assert [row["seed"] for row in results.rows()] == ["42", "44"]


@contextlib.contextmanager
def no_file_larger(size):
    """A file of this process ends at so many bytes, as it would on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_only_when_it_is_asked_to_keep_a_row(tmp_path, monkeypatch):
    results = Results(tmp_path / "results.csv")
    results.add(line())
    before = results.path.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TableError, match="cannot be written: No space left on device"):
        results.add(line(seed=44))
    assert results.path.read_bytes() == before


def test_significance_is_scipys():
    from scipy import stats

    ours = {task: [a, a + 1] for task, a in zip("abcdef", (3.0, 4.0, 8.0, 1.0, 7.0, 9.0), strict=True)}
    rival = {task: [a] for task, a in zip("abcdex", (2.0, 5.5, 3.0, 1.0, 6.0, 0.0), strict=True)}
    found = statistics.wilcoxon(ours, rival)
    means = [(3.5, 2.0), (4.5, 5.5), (8.5, 3.0), (1.5, 1.0), (7.5, 6.0)]
    assert found.count == 5
    assert found.p == stats.wilcoxon(*zip(*means, strict=True), alternative="greater").pvalue
    every = {str(i): [float(i)] for i in range(19)}
    # Better on all 19 tasks: the paper's smallest p.
    assert statistics.wilcoxon({k: [v[0] + 1 + v[0] / 100] for k, v in every.items()}, every).p == 2**-19
    assert statistics.wilcoxon(every, every) is None and statistics.wilcoxon(every, {}) is None
    a, b = [70.1, 70.9, 71.0], [69.0, 70.0, 68.0]
    assert statistics.welch(a, b).p == stats.ttest_ind(a, b, equal_var=False, alternative="greater").pvalue
    assert statistics.welch(a, b[:1]) is None


@pytest.mark.filterwarnings("ignore:Precision loss")
def test_constant_samples_have_no_p():
    # By the formula p would be 0: certain, for seeds that only never differed.
    a, b = [70.0, 70.0, 70.0], [69.0, 69.0]
    assert statistics.welch(a, b) is None and statistics.welch(b, a) is None and statistics.welch(a, a) is None
    assert statistics.constant(a, b) and not statistics.constant(a, b[:1]) and not statistics.constant(a, [69.0, 69.1])
    # One sample that varies is enough for a test.
    assert 0 < statistics.welch(a, [69.0, 69.1, 68.8]).p < 0.05


def test_what_the_results_say():
    rows = [
        {key: str(value) for key, value in line(**values).items()}
        for values in (
            {"accuracy": 0.5, "backbone": "b", "image_size": 8, "protocol": "paper-100", "trained_parameters": 110,
             "backbone_parameters": 100},
            {"accuracy": 0.7, "seed": 44, "backbone": "b", "image_size": 8, "protocol": "paper-100"},
            {"accuracy": 0.9, "seed": 44, "backbone": "b", "image_size": 8, "protocol": "quick-10"},
            {"accuracy": 0.9, "seed": 44, "backbone": "c", "image_size": 8, "protocol": "paper-100"},
            {"accuracy": 0.9, "stage": "search", "backbone": "b", "image_size": 8, "protocol": "paper-100"},
            {"accuracy": 0.8, "method": "bias", "backbone": "b", "image_size": 8, "protocol": "paper-100",
             "trained_parameters": 2, "backbone_parameters": 100},
        )
    ]  # fmt: skip
    found = collect(rows, Backbone("b", None, 8), PAPER)
    assert found["full"]["svhn"].mean == pytest.approx(60) and found["full"]["svhn"].accuracies == [50.0, 70.0]
    assert wins(found["bias"], found["full"], ["svhn"]) == 1 and wins(found["bias"], {}, ["svhn"]) is None
    assert total_parameters("full", found["full"], ["svhn"]) == 1.1
    assert total_parameters("bias", found["bias"], ["svhn"]) == 1.02


def test_runs_of_one_seed_are_counted_once_or_refused():
    about = {"backbone": "b", "image_size": 8, "protocol": "paper-100"}
    rows = [
        {key: str(value) for key, value in line(**about, **values).items()}
        for values in (
            {"accuracy": 0.5, "point": "length=5"},
            {"accuracy": 0.7, "seed": 44, "point": "length=5"},
            {"accuracy": 0.8, "point": "length=50"},
        )
    ]
    once = collect([*rows[:2], dict(rows[0])], Backbone("b", None, 8), PAPER)
    assert once["full"]["svhn"].accuracies == [50.0, 70.0]
    with pytest.raises(
        TableError, match=r"two runs of full on svhn have the seed 42 \(length=5: 0.5; length=50: 0.8\)"
    ):
        collect(rows, Backbone("b", None, 8), PAPER)


def test_equal_means_are_no_win_whatever_their_binary_forms_add_up_to():
    ours, rival = ([0.002, 0.004], [0.001, 0.005])
    found = [Measured([100 * value for value in values]) for values in (ours, rival)]
    assert sum(found[0].accuracies) != sum(found[1].accuracies), "otherwise the test shows nothing"
    assert wins({"svhn": found[0]}, {"svhn": found[1]}, ["svhn"]) == 0
    assert statistics.wilcoxon({"svhn": found[0].accuracies}, {"svhn": found[1].accuracies}) is None
    # Three differences of one size share their ranks.
    first = {task: [value] for task, value in zip("abc", (0.1 + 0.2, 0.7, 1.3), strict=True)}
    second = {task: [value] for task, value in zip("abc", (0.2, 0.6, 1.2), strict=True)}
    shared = {task: [value] for task, value in zip("abc", (1.0, 1.0, 1.0), strict=True)}
    assert statistics.wilcoxon(first, second).p == statistics.wilcoxon(shared, {key: [0.0] for key in "abc"}).p


def test_markdown_and_latex():
    table = Layout("A_b", ("method", "x"), [("one", [Entry("1 ± 2", 1.0, "3")]), ("two", [Entry("5%", 5.0)])], ["n"])
    assert "| one | 1 ± 2 (3) |\n| two | **5%** |" in table.markdown()
    latex = table.latex()
    assert r"\caption{A\_b}" in latex and r"one & 1 $\pm$ 2 {\scriptsize (3)} \\" in latex
    assert r"two & \textbf{5\%} \\" in latex


def test_which_tasks_a_folder_has(vtab):
    tasks, missing = find(vtab)
    assert {task.name: folder for task, folder in tasks.items()} == {"cifar100": "cifar", "eurosat": "eurosat"}
    assert len(missing) == 22
    assert [task.name for task in find(vtab, ["cifar"])[0]] == ["cifar100"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["vpt-fiq7"], "unknown table 'vpt-fiq7'; did you mean 'vpt-fig7'?"),
        (["vpt-1", "--methods", "vptdeep"], "unknown method 'vptdeep'; did you mean 'vpt-deep'?"),
        (["vpt-1", "--tasks", "eurosatt"], "unknown task 'eurosatt'; did you mean 'eurosat'?"),
        (["vpt-1", "--tasks", "svhn"], "no folder for svhn"),
        (["vpt-1", "--seeds", "0"], "--seeds must be at least 1"),
        (["vpt-1", "--storage", "nonsense"], "--storage nonsense: cannot be opened"),
    ],
)
def test_requests_that_cannot_be_served(arguments, message, vtab, tmp_path, capsys):
    place = ["--backbone", "vit_tiny_patch16_224", "--data", str(vtab), "--out", str(tmp_path / "out")]
    assert main([*arguments, *place]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_broken_list_ends_everything_before_it_starts(vtab, tmp_path, capsys):
    (vtab / "eurosat" / "val200.txt").write_text("images/0.png 4\n")
    place = ["--backbone", "vit_tiny_patch16_224", "--data", str(vtab), "--out", str(tmp_path / "out")]
    assert main(["vpt-1", *place]) == 2
    assert "val200.txt:1: label 4 is out of range" in capsys.readouterr().err
    (vtab / "eurosat" / "val200.txt").unlink()
    with pytest.raises(DataError, match=r"val200\.txt: list file not found"):
        find(vtab)
    assert not (tmp_path / "out").exists()


def jobs(vtab, row="linear", points=2):
    quick = Protocol(2, 1, True, (42,))
    chosen = list(PAPER.grid(ROWS[row]))[:points]
    backbone = Backbone("vit_tiny_patch16_224", "random", 32)
    return [Job(backbone, vtab, "eurosat", "eurosat", ROWS[row], quick, "search", tuple(p.items()), 0) for p in chosen]


def test_runs_are_done_once_whoever_asks(vtab, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(Job, "run", lambda self, *_: trained.append(self) or self.key() | rest())

    def rest():
        return {name: "1" for name in FIELDS if name not in KEY}

    results, said = Results(tmp_path / "results.csv"), []
    todo = jobs(vtab, "bias", points=5)
    for _ in range(2):
        study.run_all(todo, results, tmp_path, study.storage(None, tmp_path), said.append)
    assert trained == todo and len(said) == 10
    # A row that is lost is measured again; another's that is there is not.
    lines = results.path.read_text().splitlines(keepends=True)
    results.path.write_text("".join(lines[:3]))
    study.run_all(todo, results, tmp_path, study.storage(None, tmp_path), said.append)
    assert trained == todo + todo[2:]


def test_a_real_run_and_one_that_diverges(vtab, tmp_path, monkeypatch):
    job = jobs(vtab)[0]
    # What the process occupied before is not the run's.
    torch.ones(400 * 2**20, dtype=torch.uint8)
    before = memory.resident() / 2**20
    row = job.run(tmp_path / "runs")
    assert 0 < float(row["peak_memory_mb"]) < before + 300 or not memory.forget_peak()
    assert row.keys() == set(FIELDS) and 0 <= float(row["accuracy"]) <= 1 and int(row["trained_parameters"]) > 0
    # Features of the batch, and a little of the loss.
    assert 1 <= float(row["saved_mb"]) / (12 * 192 * 4 / 2**20) < 1.2
    # Until its row is kept, a finished run is there to be asked again.
    assert job.run(tmp_path / "runs") == row
    job.clear(tmp_path / "runs")
    assert not list((tmp_path / "runs").iterdir())
    from fastpeft.trainer import session
    from fastpeft.trainer.loop import DivergedError

    def diverge(*arguments):
        raise DivergedError("the loss is nan")

    monkeypatch.setattr(session, "run", diverge)
    assert job.run(tmp_path / "runs")["accuracy"] == "0"


def test_what_a_run_keeps_for_its_backward_pass_is_shown(tmp_path):
    from bench.figures import cost
    from bench.figures.studies import studies
    from bench.report import summary

    results = Results(tmp_path / "results.csv")
    shown = {
        "trained_parameters": 5,
        "backbone_parameters": 10,
        "backbone": "b",
        "image_size": 8,
        "protocol": "quick-2",
    }
    for seed, saved in ((42, "3.500"), (44, "4.250"), (82, "")):
        results.add(line(seed=seed, saved_mb=saved, **shown))
    (axis,) = cost.costs(results.rows()).axes
    assert axis.get_xlabel() == "saved for the backward pass, MB"
    (found,) = studies(results.rows())
    assert summary.costs(found)[0].saved == "3.9 (3.5 to 4.2)"


def test_a_table_from_nothing_and_again_from_its_results(vtab, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["vpt-1", "--backbone", "vit_tiny_patch16_224@random", "--image-size", "32", "--data", str(vtab)]
    command += ["--out", str(out), "--quick", "--epochs", "2", "--seeds", "2", "--tasks", "eurosat"]
    assert main([*command, "--methods", "linear", "bias", "sidetune"]) == 0
    said = capsys.readouterr().out
    assert "not in the library, left out: sidetune" in said and "thinned grid, 2 epochs" in said
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["stage"] for row in rows] == ["search"] * 2 + ["final"] * 2 + ["search"] * 2 + ["final"] * 2
    kept = {path.name: path.read_bytes() for path in out.glob("vpt-1.*")}
    assert set(kept) == {"vpt-1.md", "vpt-1.tex"} and b"eurosat" not in kept["vpt-1.md"]
    for path in out.glob("vpt-1.*"):
        path.unlink()
    assert main([*command, "--methods", "linear", "bias", "sidetune", "--tabulate"]) == 0
    assert {path.name: path.read_bytes() for path in out.glob("vpt-1.*")} == kept
    assert main([*command, "--methods", "linear", "bias", "sidetune"]) == 0
    assert len(Results(out / "results.csv").rows()) == len(rows)
    for name in ("vpt-13", "vpt-10", "vpt-fig16"):
        assert main([name, *command[1:], "--tabulate"]) == 0
        assert (out / f"{name}.md").is_file()
    assert "Of fewer runs" not in (out / "vpt-13.md").read_text()
    more = ["3" if one == "2" and command[place - 1] == "--seeds" else one for place, one in enumerate(command)]
    assert main(["vpt-13", *more[1:], "--tabulate"]) == 0
    note = "Of fewer runs than there are seeds: linear on eurosat (2 of 3), bias on eurosat (2 of 3)."
    assert note in (out / "vpt-13.md").read_text()
