"""Figures of result files: what they show, that they are the same each time, that colours can be told apart."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

pytest.importorskip("optuna")

from bench.figures import catalogue, cost, losses, parameters, samples, sensitivity, significance, style, tasks
from bench.figures.studies import Study, base_task, seed_means, sizes_of, studies
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
    assert base_task(drawn) == "cifar100"
    assert {row["task"] for row in STUDY.main} == {"cifar100", "svhn", "eurosat"}
    # Where the task itself is not there, its draw is what there is.
    alone = Study("b", "32", "p", (drawn,))
    assert alone.main == [drawn]


def test_a_number_in_a_name_is_no_draw_of_a_task_that_nobody_knows():
    row = next(row for row in ROWS if row["task"] == "svhn" and row["stage"] == "final")
    ten, hundred = (row | {"task": f"cifar-{number}"} for number in (10, 100))
    assert [base_task(row) for row in (ten, hundred)] == ["cifar-10", "cifar-100"]
    assert Study("b", "32", "p", (ten, hundred)).main == [ten, hundred]
    assert sizes_of([ten, hundred]) == {}


def test_the_main_training_set_has_all_sizes_stages_and_ends():
    assert STUDY.main == [row for row in ROWS if row["task"] != "cifar100-400"]
    assert {row["train_size"] for row in STUDY.main} == {"", "480", "600", "800", "1000"}
    # What the other rows are of is a column's to say.
    few, many = (
        [row | {"setting": f"n_train={size}", "train_size": str(size)} for row in rows]
        for size, rows in ((400, ROWS[:9]), (5000, ROWS))
    )
    study = Study("b", "32", "p", (*many, *ROWS[:3], *few))
    assert study.settings == ["", "n_train=5000", "n_train=400"] and study.main == ROWS[:3]
    assert study.of("n_train=400") == few
    # Without a run on the tasks as they are, what most runs have.
    assert Study("b", "32", "p", (*few, *many)).settings == ["n_train=5000", "n_train=400"]
    assert Study("b", "32", "p", ()).main == []


def test_training_images_are_counted_as_the_tables_count_them():
    # Of a task with draws the final runs', of others those of the search.
    sizes = {"cifar100": 1000, "cifar100-400": 400, "svhn": 800, "eurosat": 480}
    assert sizes_of(ROWS) == {(task, ""): size for task, size in sizes.items()}
    finals = [row | {"train_size": "500", "setting": "n_train=400"} for row in ROWS if row["stage"] == "final"]
    assert sizes_of(finals)["svhn", "n_train=400"] == 400
    one = finals[0] | {"task": "svhn", "setting": "", "train_size": ""}
    assert sizes_of([one]) == {("svhn", ""): 800} and sizes_of([one | {"task": "mnist"}]) == {}


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
    assert [label.get_text() for label in axis.get_xticklabels()] == ["400", "1,000"]
    assert [list(line[0].get_xdata()) for line in axis.containers] == [[400, 1000]] * 3
    assert list(axis.containers[0][0].get_ydata()) == pytest.approx([56, 41])
    assert axis.get_xlabel() == "training images, of final runs"
    assert samples.against_samples(STUDY.main) is None
    # Columns 400, 800 and 5,000 of the papers' tables; final runs have a quarter more. One a class is no such column.
    others = [
        row | {"setting": f"n_train={size}", "train_size": str(size if row["stage"] == "search" else size * 5 // 4)}
        for size in (400, 5000)
        for row in STUDY.main
    ]
    others += [row | {"setting": "one-shot", "train_size": "100"} for row in STUDY.main]
    cifar, svhn, eurosat = samples.against_samples([*STUDY.main, *others]).axes
    for axis in (cifar, svhn):
        assert [label.get_text() for label in axis.get_xticklabels()] == ["400", "800", "5,000"]
        assert axis.get_xlabel() == "training images, without validation's"
    assert [label.get_text() for label in eurosat.get_xticklabels()] == ["400", "\n480", "5,000"]


# Of the offline study; of a task with lists for the search; close ones; one size of two training sets.
@pytest.mark.parametrize(
    ("sizes", "down"),
    [
        ((400, 800, 1000, 5000), {0: 3, 1: 1}),
        ((320, 400, 480, 600, 5000), {0: 3, 1: 2}),
        ((800, 820, 840, 10_000), {0: 2, 1: 1, 2: 1}),
        ((400, 1000, 1000, 2500), {0: 3}),
        ((800, 1000), {0: 2}),
    ],
)
def test_labels_of_sizes_do_not_cover_one_another(sizes, down):
    own = [row for row in STUDY.main if row["task"] == "svhn" and row["stage"] == "final"]
    rows = [
        row | {"setting": f"n_train={size}", "accuracy": f"{0.3 + 0.1 * place}"}
        for place, size in enumerate(dict.fromkeys(sizes))
        for row in own
    ]
    if len(set(sizes)) < len(sizes):
        rows += [row | {"setting": f"n_train={sizes[0]}", "task": "svhn-1000"} for row in own]
    (axis,) = samples.against_samples(rows).axes
    shown = [label for label in axis.get_xticklabels() if label.get_text()]
    assert [label.get_text().strip() for label in shown] == [f"{size:,}" for size in dict.fromkeys(sizes)]
    canvas = FigureCanvasAgg(axis.figure)
    with style.settings():
        canvas.draw()
    lines = {}
    for label in shown:
        text = label.get_text()
        box = label.get_window_extent(canvas.get_renderer())
        lines.setdefault(text.count("\n"), []).append((box.x0, box.x1))
    for own in lines.values():
        assert all(end + 2 < start for (_, end), (start, _) in pairwise(own)), lines
    # What fits stays on the first line.
    assert {line: len(own) for line, own in lines.items()} == down


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


def kept_losses(row, epochs=4):
    """Lines of a run that was tested after every epoch."""
    key = {name: row[name] for name in KEY}
    return [
        key | {"epoch": str(epoch), "split": split, "loss": f"{start / epoch}", "accuracy": ""}
        for epoch in range(1, epochs + 1)
        for split, start in (("train", 2), ("test", 3))
    ]


def test_losses_are_of_the_runs_tested_after_every_epoch(monkeypatch):
    monkeypatch.setattr(catalogue, "KINDS", ())
    finals = [row for row in STUDY.main if row["stage"] == "final"]
    (first,) = (row for row in finals if (row["task"], row["method"], row["seed"]) == ("svhn", "full", "42"))
    curve = first | {"stage": "curve"}
    enlarged = [curve | {"setting": "n_train=5000", "task": task} for task in ("svhn", "eurosat")]
    study = Study("b", "32", "p", (*finals, curve, *enlarged))
    lines = [line for row in (*finals, curve, *enlarged) for line in kept_losses(row, 1 if row in finals else 4)]
    # Of a run that is not in the results, for one because its row was taken out.
    lines += kept_losses(curve | {"task": "dtd"})
    found = catalogue.curves_of(study, lines)
    assert {name: len(own) for name, own in found.items()} == {"": 2 * (len(finals) - 3) + 8, "n_train=5000": 16}
    figures = dict(catalogue.of_study(study, lines))
    assert {name for name in figures if name.startswith("losses")} == {"losses", "losses-n-train-5000"}
    svhn, eurosat = figures["losses-n-train-5000"].axes
    for axis in (svhn, eurosat):
        train, test = axis.lines
        assert (train.get_linestyle(), test.get_linestyle()) == ("-", "--")
        assert list(train.get_ydata()) == pytest.approx([2, 1, 2 / 3, 0.5]) and list(test.get_xdata()) == [1, 2, 3, 4]
    # The main set: full on svhn is the one run with both lines, the others the final runs' training.
    _, svhn, _ = figures["losses"].axes
    assert [line.get_linestyle() for line in svhn.lines] == ["-", "--", "-", "-"]
    # Of losses alone there is a figure too.
    assert "losses" in dict(catalogue.of_study(Study("b", "32", "p", (curve,)), lines))


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
        # Whose numbers they are, and by which protocol.
        assert path.suffix == ".png" or (b"vit_b@random" in content and b"quick-4" in content), path
    assert not list(tmp_path.rglob(".*"))


def test_only_what_is_asked_for_and_has_changed_is_drawn(tmp_path, monkeypatch):
    drawn = []
    kinds = [dataclasses.replace(catalogue.KINDS[0], draw=lambda rows: drawn.append(rows[0]) or tasks.per_task(rows))]
    monkeypatch.setattr(catalogue, "KINDS", kinds)
    ours = [row for row in ROWS if row["task"] == "eurosat" and row["stage"] == "final"]
    theirs = [row | {"protocol": "paper-100"} for row in ours]
    write_results(tmp_path, ours + theirs)
    first = catalogue.write(tmp_path, lambda study: study.protocol == "quick-4")
    assert [row["protocol"] for row in drawn] == ["quick-4"] and {path.parent.name for path in first} == {STUDY.slug}
    # Again, as the next table of the same runs asks.
    assert catalogue.write(tmp_path, lambda study: study.protocol == "quick-4") == first and len(drawn) == 1
    assert set(first) < set(catalogue.write(tmp_path)) and [row["protocol"] for row in drawn[1:]] == ["paper-100"]
    # A row fewer, a figure that is gone, a note that says nothing: each has its own study drawn again.
    table = tmp_path / "results.csv"
    heading, _, *rest = table.read_text().splitlines(keepends=True)
    table.write_text("".join([heading, *rest]))
    assert catalogue.write(tmp_path) and [row["protocol"] for row in drawn[2:]] == ["quick-4"]
    first[0].unlink()
    assert first[0] in catalogue.write(tmp_path) and first[0].is_file() and len(drawn) == 4
    (first[0].parent / catalogue.DRAWN).write_text("[]")
    assert catalogue.write(tmp_path) and len(drawn) == 5
    monkeypatch.setattr(catalogue, "_makers", lambda: ("another version",))
    assert catalogue.write(tmp_path) and len(drawn) == 7


def test_a_title_has_room_of_its_own_and_is_no_wider_than_the_figure():
    rows = [row for row in STUDY.main if row["task"] == "svhn"]
    plain = tasks.per_task(rows)
    with style.titled("a_backbone@/some/folder/of/checkpoints/weights.npz at 224 px, quick-10"):
        figure = tasks.per_task(rows)
    (axis,), (usual,) = figure.axes, plain.axes
    title = figure.get_suptitle()
    assert title.splitlines()[-1].endswith("quick-10") and title.count("\n") == 1 and plain.get_suptitle() == ""
    heights = [one.get_size_inches()[1] for one in (figure, plain)]
    assert heights[0] > heights[1]
    # Its lines take nothing from the panel.
    sizes = [panel.get_position().height * height for panel, height in zip((axis, usual), heights, strict=True)]
    assert sizes[0] == pytest.approx(sizes[1], abs=0.12)
    assert tasks.per_task(rows).get_suptitle() == ""


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
