"""Figures of result files: what they show, that they are the same each time, that colours can be told apart."""

from __future__ import annotations

import matplotlib
import pytest

pytest.importorskip("optuna")

from bench.figures import catalogue, cost, losses, parameters, samples, sensitivity, significance, style, tasks
from bench.figures.studies import Study, base_task, seed_means, size_of, studies
from bench.tables import curves, statistics
from bench.tables.errors import TableError
from bench.tables.results import KEY
from tests.bench.made_results import METHODS, made_rows, write_results

ROWS = made_rows()
STUDY = studies(ROWS)[0]


def texts(axis) -> list[str]:
    return [text.get_text() for text in axis.texts]


def test_studies_are_what_may_be_compared():
    other = [row | {"protocol": "paper-100"} for row in ROWS]
    found = studies(ROWS + other)
    assert [study.protocol for study in found] == ["quick-4", "paper-100"]
    assert {study.slug for study in found} == {"vit-b-random-32-quick-4", "vit-b-random-32-paper-100"}
    assert [len(study.rows) for study in found] == [len(ROWS)] * 2
    weights = Study("vit_b@a/b/ViT B.npz", "32", "p", ())
    assert weights.slug == "vit-b-vit-b-npz-32-p"


def test_draws_of_a_task_are_no_further_tasks():
    drawn = next(row for row in ROWS if row["task"] == "cifar100-400")
    assert (base_task(drawn), size_of(drawn)) == ("cifar100", 400)
    assert size_of(drawn | {"task": "cifar100"}) == 800 and size_of(drawn | {"task": "mnist"}) is None
    assert size_of(drawn | {"train_size": "5000"}) == 5000
    assert {row["task"] for row in STUDY.main} == {"cifar100", "svhn", "eurosat"}
    # Where the task itself is not there, its draw is what there is.
    alone = Study("b", "32", "p", (drawn,))
    assert alone.main == [drawn]
    # With a column that says how many, what most runs have.
    few = [row | {"train_size": "400"} for row in ROWS if row["method"] == "full" and row["task"] != "cifar100-400"]
    many = [row | {"train_size": "800"} for row in STUDY.main]
    assert Study("b", "32", "p", (*few, *many)).main == many


def test_means_over_tasks_by_seed():
    means = seed_means(STUDY.main, "full", ["cifar100", "eurosat"])
    assert means == pytest.approx([(40 + 50) / 2, (41 + 51) / 2])
    assert seed_means(STUDY.main, "full", ["cifar100", "dtd"]) == []


def test_every_seed_its_mean_and_the_papers_number():
    figure = tasks.per_task(STUDY.main)
    assert [axis.get_title() for axis in figure.axes] == ["cifar100", "svhn", "eurosat"]
    (axis,) = tasks.per_task([row for row in STUDY.main if row["task"] == "eurosat"], METHODS).axes
    points = [tuple(map(float, line.get_xdata())) for line in axis.lines]
    assert (50.0, 51.0) in [tuple(round(value, 6) for value in one) for one in points]
    assert (50.5,) in [tuple(round(value, 6) for value in one) for one in points]
    # Table 13: full on EuroSAT.
    assert (95.7,) in points
    assert tasks.per_task([]) is None


def test_a_method_that_lacks_a_task_is_not_in_its_groups_panel():
    rows = [row for row in STUDY.main if (row["method"], row["task"]) != ("linear", "svhn")]
    natural, specialized = parameters.against_parameters(rows).axes
    assert natural.get_title() == "natural, 2 tasks" and specialized.get_title() == "specialized, 1 task"
    assert texts(natural) == ["vpt-deep", "full"] and texts(specialized) == ["linear", "vpt-deep", "full"]
    assert parameters.against_parameters([row for row in rows if row["stage"] == "search"]) is None


def test_names_do_not_cover_one_another():
    close = {"full": 100, "linear": 101, "vpt-deep": 102}
    rows = [row | {"trained_parameters": str(close[row["method"]])} for row in STUDY.main]
    (axis,) = parameters.against_parameters([row for row in rows if row["task"] == "svhn"]).axes
    places = {(one.xyann, one.get_ha(), one.get_va()) for one in axis.texts}
    assert len(axis.texts) == 3 and places <= {
        ((across, down), along, up)
        for along, up, across, down in (
            ("center", "bottom", 0, 8), ("center", "top", 0, -8), ("left", "center", 8, 0), ("right", "center", -8, 0),
            ("center", "bottom", 0, 17), ("center", "top", 0, -17),
        )
    }  # fmt: skip


def test_numbers_of_training_images():
    (axis,) = samples.against_samples(STUDY.rows).axes
    assert axis.get_title() == "cifar100"
    assert [label.get_text() for label in axis.get_xticklabels()] == ["400", "800"]
    assert [list(line[0].get_xdata()) for line in axis.containers] == [[400, 800]] * 3
    assert list(axis.containers[0][0].get_ydata()) == pytest.approx([56, 41])
    assert samples.against_samples(STUDY.main) is None


def test_the_best_cell_is_bold_and_a_diverged_one_is_marked():
    own = [row for row in STUDY.main if (row["method"], row["task"]) == ("full", "svhn")]
    (axis,) = sensitivity.heatmaps(own).axes
    assert texts(axis) == ["50.3", "div.", "50.2", "div."]
    assert [text.get_weight() == "bold" for text in axis.texts] == [True, False, False, False]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["0.001", "0"]
    lost = [row | {"trained_parameters": "", "accuracy": "0"} for row in own]
    (axis,) = sensitivity.heatmaps(lost).axes
    assert texts(axis) == ["div."] * 4
    # Over a prompt length the best counts.
    deep = [row for row in STUDY.main if (row["method"], row["task"]) == ("vpt-deep", "svhn")]
    assert "73.1" in texts(sensitivity.heatmaps(deep).axes[0])


def test_learning_rates_behind_the_best():
    full, linear, _ = sensitivity.rates(STUDY.main).axes
    # svhn diverged at the larger rate: it is counted there and not in the mean.
    assert texts(full) == ["1 div."] and texts(linear) == []
    assert list(linear.lines[0].get_ydata()) == pytest.approx([1.8, 0])
    assert list(full.lines[0].get_ydata()) == pytest.approx([(1.8 + 0 + 1.8) / 3, 0])
    (axis, *_) = sensitivity.knobs(STUDY.main).axes
    assert axis.get_xlabel() == "prompt length" and list(axis.lines[0].get_ydata()) == pytest.approx([72.2, 73.1])
    assert sensitivity.knobs([row for row in ROWS if row["method"] == "full"]) is None


def test_significance_is_that_of_the_tables():
    figure = significance.matrix(STUDY.main)
    found = {
        method: {
            task: [100 * float(row["accuracy"]) for row in STUDY.main
                   if (row["stage"], row["method"], row["task"]) == ("final", method, task)]
            for task in ("cifar100", "svhn", "eurosat")
        }
        for method in METHODS
    }  # fmt: skip
    wilcoxon, welch = figure.axes
    assert len(wilcoxon.texts) == 6
    p = statistics.wilcoxon(found["vpt-deep"], found["full"]).p
    assert p == 0.125 and any(text.get_text() == "0.12" for text in wilcoxon.texts if text.get_position() == (0, 2))
    counts = {text.get_position(): text.get_text() for text in welch.texts}
    below = sum(statistics.welch(found["vpt-deep"][t], found["full"][t]).p < 0.05 for t in found["full"])
    assert counts[0, 2] == f"{below}/3" and below > 0 and counts[2, 0] == "0/3"
    assert significance.matrix([row for row in ROWS if row["method"] == "full"]) is None


def test_costs_and_losses():
    assert len(cost.costs(STUDY.main).axes) == 2
    saved = [row | {"saved_mb": "3.5"} for row in STUDY.main]
    assert len(cost.costs(saved).axes) == 3
    nothing = [row | dict.fromkeys(("ms_per_image", "peak_memory_mb"), "") for row in STUDY.main]
    assert cost.costs(nothing) is None and losses.by_epoch([]) is None


def test_the_same_rows_give_the_same_files(tmp_path):
    rows = [row for row in ROWS if row["method"] != "linear" and row["task"] != "svhn"]
    for name in ("a", "b"):
        write_results(tmp_path / name, rows)
    first = {path.relative_to(tmp_path / "a"): path.read_bytes() for path in catalogue.write(tmp_path / "a")}
    # Nobody's own settings come in, nor the time.
    with matplotlib.rc_context({"font.size": 20, "svg.hashsalt": "x", "axes.facecolor": "red"}):
        second = {path.relative_to(tmp_path / "b"): path.read_bytes() for path in catalogue.write(tmp_path / "b")}
    assert first == second
    names = {path.name for path in first}
    kinds = {"tasks", "parameters", "samples", "significance", "rates", "knobs", "cost", "losses"}
    kinds |= {"search-full", "search-vpt-deep"}
    assert names == {f"{name}.{kind}" for name in kinds for kind in ("svg", "png")}
    for path, content in first.items():
        assert b"Matplotlib" not in content and b"<dc:date>" not in content, path
        assert content.startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")
    assert not list(tmp_path.rglob(".*"))


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "figures").write_text("a file")
    with pytest.raises(TableError, match=r"tasks\.svg: cannot be written"):
        style.write(tasks.per_task(STUDY.main), tmp_path / "figures" / "tasks")


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_stand_out_from_both_grounds():
    for light, dark in style.PALETTE:
        assert contrast(light, style.PAPER) >= 3 and contrast(dark, style.DARK_PAPER) >= 3, (light, dark)
    assert contrast(style.INK, style.PAPER) >= 7 and contrast(style.DARK_INK, style.DARK_PAPER) >= 7


def test_each_method_has_its_own_look():
    methods = ["full", "linear", "vpt-deep", "bitfit+lora", "own", "another"]
    found = {tuple(style.look(method, methods).values()) for method in methods}
    assert len(found) == len(methods)
    assert style.look("full", ["full"]) == style.look("full", methods)


def test_losses_are_kept_by_run(tmp_path):
    key = dict.fromkeys(KEY, "x")
    history = [{"epoch": 1, "train_loss": 0.5}, {"epoch": 2, "train_loss": 0.25, "test_loss": 1, "test_accuracy": 0.5}]
    curves.keep(tmp_path / "curves" / "a.csv", key, history)
    kept = [
        tuple(line[name] for name in ("epoch", "split", "loss", "accuracy"))
        for line in curves.read(tmp_path / "curves")
    ]
    assert kept == [("1", "train", "0.5", ""), ("2", "train", "0.25", ""), ("2", "test", "1", "0.500000")]
    assert curves.read(tmp_path / "none") == []
    (tmp_path / "curves" / "b.csv").write_text("a,b\n")
    with pytest.raises(TableError, match=r"b\.csv: its columns are not those"):
        curves.read(tmp_path / "curves")
    (tmp_path / "curves" / "b.csv").write_text(",".join(curves.FIELDS) + "\n1,2\n")
    with pytest.raises(TableError, match=r"b\.csv:2: expected"):
        curves.read(tmp_path / "curves")


def test_losses_that_cannot_be_kept_are_one_line(tmp_path):
    (tmp_path / "curves").write_text("a file")
    with pytest.raises(TableError, match=r"a\.csv: cannot be written"):
        curves.keep(tmp_path / "curves" / "a.csv", dict.fromkeys(KEY, "x"), [])
