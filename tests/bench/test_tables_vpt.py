"""The tables of the VPT paper: rows, roles of backbones, plans of runs, and layouts from rows that are made up."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch

pytest.importorskip("optuna")

from bench.tables import backbones, cells, class_means, cost, statistics
from bench.tables.__main__ import main
from bench.tables.errors import TableError
from bench.tables.job import Backbone, Job
from bench.tables.papers import tables, vpt_ablations, vpt_cost, vpt_main
from bench.tables.protocol import ROWS, Protocol, batch_size, method
from bench.tables.request import backbones_of
from bench.tables.results import FIELDS, KEY, Results
from bench.tables.spec import MAIN, Request, View, label
from bench.tables.tasks import TASKS
from fastpeft.data.fgvc import DATA_SETS

MINE = [name for name in tables() if name.startswith("vpt-")]
SHORT = {"vpt-4", "vpt-12"}
# Of significance: nothing competes in them.
TESTS = {"vpt-10", "vpt-fig16"}
TINY = "vit_tiny_patch16_224@random"


def named(*names):
    """Tables by name."""
    return [name for name in MINE if name in names]


def command(name, vtab, out, *more):
    """Arguments for a table, with every role's backbone."""
    roles = [f"{role.name}={TINY}" for role in tables()[name].roles]
    given = itertools.chain.from_iterable(("--backbone", role) for role in roles)
    return [name, *given, "--data", str(vtab), "--out", str(out), *more]


def row_of(request, role, row, task, seed, accuracy):
    """A final run's row, made up."""
    backbone = request.backbones[role]
    fit = request.row(row, role)
    point = next(iter(request.protocol(role).grid(fit)))
    job = Job(
        backbone, request.root, task.name, task.name, fit, request.protocol(role), "final", tuple(point.items()), seed
    )
    values = dict.fromkeys((name for name in FIELDS if name not in KEY), "")
    return job.key() | values | {"accuracy": accuracy, "trained_parameters": 100, "backbone_parameters": 1000}


def list_images(root, name):
    """JSON splits of an FGVC data set, whose images nobody opens."""
    kind = next(kind for kind in DATA_SETS if kind.name == name)
    folder = root / kind.folders[0]
    (folder / kind.images).mkdir(parents=True)
    for split, names in (("train", "ab"), ("val", "c"), ("test", "d")):
        for name in names:
            (folder / kind.images / f"{name}.png").touch()
        (folder / f"{split}.json").write_text(json.dumps({f"{name}.png": 7 for name in names}))


def request_of(name, tmp_path, tasks, **fields):
    spec = tables()[name]
    given = {role.name: Backbone.parse(TINY, role.image_size, role.model) for role in spec.roles}
    folders = {task: task.name for task in tasks if spec.takes(task)}
    return Request(spec, spec.rows, given, folders, tmp_path, tmp_path, quick=True, seeds=2, **fields)


def test_all_tables_of_the_paper_are_there():
    numbers = {*(f"vpt-{n}" for n in (1, 2, 3, 4, 5, 6, 10, 11, 13, 14))}
    numbers |= {f"vpt-fig{n}" for n in (4, 5, 6, 7, 8, 11, 12, 13, 14, 16, 17)}
    assert numbers <= set(MINE)


def test_every_row_is_a_method_that_trains():
    from fastpeft.methods import from_dict

    for name in MINE:
        for row in tables()[name].rows:
            if row.missing or row.parts[0].get("init") == "class-means":
                continue
            point = next(iter(Protocol(2, 1, False, (42,)).grid(row)))
            from_dict(method(row, point))
            assert batch_size(row, point) > 0


def view_with(name, tmp_path, given, sizes=(), quick=False):
    """A table of nothing with these backbones."""
    spec = tables()[name]
    request = Request(spec, spec.rows, backbones_of(spec, given, sizes), {}, tmp_path, tmp_path, quick)
    return View(request, [])


@pytest.mark.parametrize(
    "name, backbone, same",
    [
        ("vpt-1", "vit_base_patch16_224@some/where/ViT-B_16.npz", True),
        ("vpt-1", "vit_base_patch16_224.orig_in21k@hub", True),
        ("vpt-1", "vit_base_patch16_224@random", False),
        ("vpt-1", "vit_base_patch16_224", False),
        # timm's own choice is another pre-training.
        ("vpt-1", "vit_base_patch16_224@hub", False),
        ("vpt-1", "vit_base_patch16_224.orig_in21k", False),
        ("vpt-1", "vit_base_patch16_224@mae_pretrain_vit_base.pth", False),
        ("vpt-5", "mae=vit_base_patch16_224@mae_pretrain_vit_base.pth", True),
        ("vpt-5", "mocov3=vit_base_patch16_224@mae_pretrain_vit_base.pth", False),
        ("vptft-10", "vit_base_patch16_224@mae_pretrain_vit_base.pth", True),
        ("vptft-7", "swin_base_patch4_window7_224@ViT-B_16.npz", False),
        ("vpt-fig4", "vit-l=vit_large_patch16_224@ViT-L_16.npz", True),
        # Costs are those of any weights.
        ("vpt-12", "vit_base_patch16_224@random", True),
    ],
)
def test_other_weights_are_marked(name, backbone, same, tmp_path):
    view = view_with(name, tmp_path, [backbone])
    (role,) = view.request.backbones
    assert view.same(role) == same
    printed = cells.cell("vpt_table01", method="full", task="group_mean", group="natural", metric="accuracy")
    assert view.paper(printed, role).endswith("‡") != same
    notes = view.notes()
    assert any(note.startswith("‡") for note in notes) != same
    # What was used and what the paper has, side by side, also where they are the same.
    paper = view.request.spec.role(role)
    used = view.request.backbones[role]
    assert f"{used} at {paper.image_size} px" in notes[0] and f"(the paper's: {paper})" in notes[0]
    assert ("random weights" in notes[0]) == ("@" not in backbone)


def drawn(name, request, rows):
    """The figure of a table that rests on these rows."""
    lines = [{key: str(value) for key, value in row.items()} for row in rows]
    return request.spec.draw(View(request, lines))


def test_fig4_is_drawn_of_all_backbones(tmp_path):
    tasks = [task for task in TASKS if task.name in ("svhn", "dtd", "eurosat")]
    request = request_of("vpt-fig4", tmp_path, tasks)
    # By role and method: every mean is another; the largest backbone lacks a task of the natural ones.
    given = {
        role: Backbone.parse(f"{TINY}-{role}", 224) for role in ("vit-b", "vit-l", "vit-h")
    }  # fmt: skip
    request = dataclasses.replace(request, backbones=given)
    rows = [
        row_of(request, role, ROWS[method], task, seed, 0.1 * number + 0.3 * (method == "full"))
        for number, role in enumerate(given)
        for method in ("full", "vpt-deep")
        for task in tasks
        for seed in (42, 44)
        if (role, task.name) != ("vit-h", "dtd")
    ]
    natural, specialized = drawn("vpt-fig4", request, rows).axes
    assert natural.get_title() == "natural (2 of 7)" and specialized.get_title() == "specialized (1 of 4)"
    assert [label.get_text() for label in natural.get_xticklabels()] == ["ViT-B/16", "ViT-L/16", "ViT-H/14"]
    lines = {tuple(line.get_xdata()): list(line.get_ydata()) for line in natural.lines[:1]}
    assert lines[0, 1] == pytest.approx([30, 40])
    found = [(line.get_linestyle(), list(line.get_ydata())) for line in specialized.lines]
    assert [stroke for stroke, _ in found] == ["-", "None", "-", "None"]
    assert found[0][1] == pytest.approx([30, 40, 50]) and found[2][1] == pytest.approx([0, 10, 20])
    # Table 1 has ViT-B alone.
    assert [values for _, values in found[1::2]] == [[83.36], [82.43]]
    assert drawn("vpt-fig4", request, []) is None


def test_fig15_is_drawn_of_runs_and_their_ensemble(tmp_path):
    (task,) = (task for task in TASKS if task.name == "eurosat")
    request = request_of("vpt-fig15", tmp_path, [task])
    rows = [row_of(request, MAIN, ROWS["linear"], task, seed, score) for seed, score in ((42, 0.6), (44, 0.7))]
    together = rows[0] | {"stage": "ensemble", "accuracy": 0.8, "point": "base_lr=1;members=2"}
    (axis,) = drawn("vpt-fig15", request, [*rows, together]).axes
    assert axis.get_title() == "specialized (1 of 4)"
    assert [label.get_text() for label in axis.get_yticklabels()] == ["linear"]
    points = {(line.get_marker(), line.get_markerfacecolor() == "none"): line.get_xdata() for line in axis.lines[1:]}
    assert [float(points[marker, False][0]) for marker in "o^D"] == pytest.approx([65, 70, 80])
    assert [float(points[marker, True][0]) for marker in "o^D"] == [77.1, 77.9, 77.7]
    # Seeds that are there without an ensemble are shown all the same.
    (axis,) = drawn("vpt-fig15", request, rows).axes
    assert len(axis.lines) == 6 and drawn("vpt-fig15", request, []) is None


def test_batches_and_lengths_are_those_of_table_9():
    deep = ROWS["vpt-deep"]
    names = {
        "vit_base_patch16_224": "ViT-B/16", "vit_large_patch16_224": "ViT-L/16", "vit_huge_patch14_224": "ViT-H/14",
        "swin_base_patch4_window7_224": "Swin-B", "convnext_base": "ConvNeXt-Base", "resnet50": "ResNet-50",
    }  # fmt: skip
    for backbone, paper in names.items():

        def printed(who, setting="", paper=paper):
            return int(
                cells.cell("vpt_table09", backbone=paper, method=who, setting=setting, metric="batch_size").value
            )

        for row, who in (("linear", "linear"), ("partial-1", "partial"), ("full", "full|bias|adapter")):
            assert backbones.fitted(ROWS[row], backbone).batch_size == printed(who), (backbone, row)
        fit = backbones.fitted(deep, backbone)
        assert fit.batch_size == printed("vpt", "p<100"), backbone
    assert backbones.fitted(deep, "swin_base_patch4_window7_224").searched["length"] == (50, 10, 5, 1)
    assert backbones.fitted(ROWS["adapter"], "resnet50").searched == ROWS["adapter"].searched
    assert method(tables()["vpt-3"].rows[-1], {"length": 5, "base_lr": 1.0}) == [
        {"name": "vpt", "length": 5}, {"name": "bitfit"}
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name, given, sizes, expected",
    [
        ("vpt-1", ["a@b"], [], {"main": ("a", "b", 224)}),
        ("vpt-1", ["main=a@x=y.npz"], ["32"], {"main": ("a", "x=y.npz", 32)}),
        ("vpt-5", ["mae=a@m", "mocov3=a@n"], ["mae=64"], {"mae": ("a", "m", 64), "mocov3": ("a", "n", 224)}),
        ("vpt-5", ["mocov3=a"], [], {"mocov3": ("a", None, 224)}),
        ("vpt-11", ["a@w"], [], {"384": ("a", "w", 384), "224": ("a", "w", 224)}),
        ("vpt-4", [], [], {}),
    ],
)
def test_backbones_by_role(name, given, sizes, expected):
    found = backbones_of(tables()[name], given, sizes)
    assert {role: (one.name, one.weights, one.image_size) for role, one in found.items()} == expected


@pytest.mark.parametrize(
    "name, given, sizes, message",
    [
        ("vpt-5", ["a"], [], "this table has several; say which it is, one or more of mae=NAME@WEIGHTS"),
        ("vpt-5", ["mea=a"], [], "unknown role 'mea'; did you mean 'mae'"),
        ("vpt-5", ["mae=a", "mae=b"], [], "two backbones for mae: 'a' and 'b'"),
        ("vpt-1", [], [], "--backbone is missing"),
        ("vpt-1", ["a"], ["big"], "--image-size must be a number of pixels, got 'big'"),
    ],
)
def test_backbones_that_are_not_clear(name, given, sizes, message):
    with pytest.raises(TableError) as caught:
        backbones_of(tables()[name], given, sizes)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_backbone_that_no_family_has():
    assert backbones.lacking("vit_tiny_patch16_224") is None
    assert "ResNet" in backbones.lacking("resnet18")
    with pytest.raises(TableError, match="did you mean vit_tiny_patch16_224"):
        backbones.lacking("vit_tiny_patch16_225")


@pytest.mark.parametrize("name", [name for name in MINE if name not in SHORT])
@pytest.mark.parametrize("figures", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_table_is_laid_out_from_its_results_alike_each_time(name, figures, vtab, tmp_path, capsys, monkeypatch):
    if not figures:
        # They take most of the time.
        monkeypatch.setattr("bench.tables.__main__._draw", lambda *_: None)
    spec = tables()[name]
    tasks = [task for task in TASKS if spec.takes(task)]
    out, chosen = tmp_path / "out", dataclasses.replace(request_of(name, tmp_path, tasks), root=vtab)
    results = Results(out / "results.csv")
    out.mkdir()
    lines = [
        row_of(chosen, role, row, task, seed, f"{0.4 + 0.01 * number + 0.001 * seed % 0.05:.6f}")
        for role in chosen.backbones
        for number, row in enumerate(spec.rows)
        for task in tasks
        for seed in (42, 44)
        if not row.missing
    ]
    with results.path.open("w") as file:
        file.write(
            ",".join(FIELDS) + "\n" + "".join(",".join(f"{line[key]}" for key in FIELDS) + "\n" for line in lines)
        )
    if not tasks or name == "vpt-fig17":
        return
    for task in tasks:
        if task.group == "fgvc":
            list_images(vtab, task.name)
        elif not (vtab / task.folders[0]).exists():
            (vtab / task.folders[0]).symlink_to(vtab / "eurosat")
    asked = command(name, vtab, out, "--quick", "--seeds", "2", "--tabulate")
    kept = []
    for _ in range(2):
        assert main(asked) == 0
        kept.append({path.name: path.read_bytes() for path in out.glob(f"{name}.*")})
        for path in out.glob(f"{name}.*"):
            path.unlink()
    assert set(kept[0]) == {f"{name}.md", f"{name}.tex"} and kept[0] == kept[1]
    said = capsys.readouterr().out
    assert "Of another backbone, image size, protocol or other weights" in said
    assert ("**" in said) == (name not in TESTS)
    text = kept[0][f"{name}.md"].decode()
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1 or name in ("vpt-fig3",)
    latex = kept[0][f"{name}.tex"].decode()
    assert latex.count("{") == latex.count("}")
    for row in spec.rows:
        if row.missing:
            assert f"{row.title or row.name} (not in the library)" in text


def test_seeds_that_all_agree_are_a_dash_with_a_reason(tmp_path):
    tasks = [task for task in TASKS if task.name in ("cifar100", "svhn")]
    request = request_of("vpt-fig16", tmp_path, tasks)

    def laid_out(constant):
        score = {"vpt-deep": 0.7, "full": 0.6}
        lines = [
            row_of(request, MAIN, row, task, seed, score[row.name] + 0.001 * (seed - 42) * (task.name not in constant))
            for row in request.rows
            for task in tasks
            for seed in (42, 44)
            if row.name in score
        ]
        table = vpt_main.rivals_by_task(View(request, [{key: str(one[key]) for key in FIELDS} for one in lines]))
        place = [name for name, _ in table.rows].index(label(ROWS["full"]))
        texts = dict(zip(table.heading[1:], (entry.text for entry in table.rows[place][1]), strict=True))
        return texts, statistics.CONSTANT in table.notes

    texts, said = laid_out(constant=["cifar100"])
    assert said and texts["cifar100"] == "-" and 0 < float(texts["svhn"]) < 0.05
    texts, said = laid_out(constant=[])
    assert not said and 0 < float(texts["cifar100"]) < 0.05


class Recorder:
    """Runs that score by a rule instead of being trained."""

    def __init__(self, monkeypatch, score):
        self.jobs = []

        def run(job, runs, features=None):
            self.jobs.append(job)
            rest = dict.fromkeys((name for name in FIELDS if name not in KEY), "1")
            return job.key() | rest | {"accuracy": score(job)}

        monkeypatch.setattr(Job, "run", run)
        # Side by side nothing would be trained by `run`.
        monkeypatch.setattr(Job, "alone", True)

    def of(self, stage):
        """(method in the results, method that is trained, setting) of a stage's runs."""
        return [(job.key()["method"], job.row.method, job.setting) for job in self.jobs if job.stage == stage]


def ask(name, vtab, out, *more):
    """Make a table of one task with a thinned grid."""
    return main(command(name, vtab, out, "--quick", "--seeds", "1", "--tasks", "eurosat", *more))


def test_held_lengths_share_the_search(vtab, tmp_path, monkeypatch, capsys):
    found = Recorder(monkeypatch, lambda job: 0.5)
    assert ask("vpt-fig6", vtab, tmp_path / "out", "--methods", "vpt-deep:p=10", "vpt-deep", "adapter-8") == 0
    searched = found.of("search")
    # Of the thinned grid of prompts there is one length: both rows have the same two runs, which are done once.
    assert [name for name, _, _ in searched] == ["vpt-deep"] * 2 + ["adapter"] * 2
    assert [setting["reduction"] for name, _, setting in searched if name == "adapter"] == [8, 8]
    assert [name for name, _, _ in found.of("final")] == ["vpt-deep:p=10", "vpt-deep", "adapter-8"]


def test_depths_at_the_length_that_is_best_for_all_blocks(tmp_path, vtab, monkeypatch):
    spec = tables()["vpt-fig14"]
    rows = tuple(row for row in spec.rows if row.name in ("vpt-deep:1-3:same-p", "vpt-deep"))
    task = next(task for task in TASKS if task.name == "eurosat")
    chosen = Request(spec, rows, {"main": Backbone("vit_tiny_patch16_224", "random", 32)}, {task: "eurosat"}, vtab,
                     tmp_path, seeds=1)  # fmt: skip
    same, deep = vpt_ablations.plan_same_length(chosen)
    results = Results(tmp_path / "results.csv")
    lines = []
    monkeypatch.setattr(results, "find", lambda **key: next((x for x in lines if x["key"] == key), None))
    asked = []
    for jobs in same.batches(results):
        asked.append(jobs)
        # Prompts in all blocks are best with 50; prompts in three with any other number.
        lines += [
            {"key": job.key(), "accuracy": (job.setting["length"] == 50) == (job.key()["method"] == "vpt-deep")}
            for job in jobs
        ]
    first, second, third = asked
    assert {job.key()["method"] for job in first} == {"vpt-deep"} and len(first) == 240 == deep.size - 1
    assert {job.key()["method"] for job in second} == {"vpt-deep:1-3"} and len(second) == 40
    assert {job.setting["length"] for job in second} == {50} and second[0].row.method["depth"] == [1, 3]
    assert [job.key()["method"] for job in third] == ["vpt-deep:1-3:same-p"]
    assert sum(map(len, asked)) == same.size


@pytest.mark.slow
def test_prompts_from_class_means_are_trained(vtab, tmp_path, capsys):
    from safetensors.torch import load_file

    size = ("--image-size", "32", "--epochs", "2")
    assert ask("vpt-fig13", vtab, tmp_path, *size, "--methods", "vpt-deep:cls", "vpt-deep:cls-fixed") == 0
    rows = Results(tmp_path / "results.csv").rows()
    assert [row["method"] for row in rows] == ["vpt-deep:cls"] * 3 + ["vpt-deep:cls-fixed"] * 3
    # Four classes: four prompts in twelve blocks beside the head; fixed ones are not trained.
    free, fixed = (int(row["trained_parameters"]) for row in (rows[0], rows[-1]))
    assert free - fixed == 12 * 4 * 192 and "length=4" in rows[0]["point"]
    files = sorted((tmp_path / "class-means").iterdir())
    assert [file.name.split("-")[1] for file in files] == ["final", "search"]
    means = [load_file(file)["prompts"] for file in files]
    assert means[0].shape == (4, 192) and not torch.equal(means[0], means[1])
    # They are made once: another run that lacks a row reads what is there.
    before = [file.stat().st_mtime_ns for file in files]
    assert ask("vpt-fig13", vtab, tmp_path, *size, "--methods", "vpt-deep:cls", "vpt-deep:cls-fixed") == 0
    assert [file.stat().st_mtime_ns for file in files] == before
    assert Results(tmp_path / "results.csv").rows() == rows


def test_class_means_are_means():
    features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 8.0]])
    labels = torch.tensor([1, 1, 0])
    assert class_means.means_of(features, labels, 2, 2).tolist() == [[0.0, 8.0], [2.0, 0.0]]
    with pytest.raises(TableError, match="class 2 has no training image"):
        class_means.means_of(features, labels, 3, 3)
    # Fewer prompts than classes: centroids of all features.
    clouds = torch.cat([torch.zeros(4, 2), torch.full((4, 2), 9.0)]) + 0.1 * torch.arange(8)[:, None]
    found = class_means.means_of(clouds, torch.arange(8), 8, 2)
    expected = torch.stack([clouds[:4].mean(0), clouds[4:].mean(0)])
    torch.testing.assert_close(found[found[:, 0].argsort()], expected)


def test_sensitivity_is_laid_out_from_the_search(vtab, tmp_path, monkeypatch, capsys):
    Recorder(monkeypatch, lambda job: f"{0.1 * job.setting['base_lr'] ** 0.5 + job.setting['weight_decay']:.6f}")
    assert ask("vpt-fig17", vtab, tmp_path, "--methods", "linear", "vpt-deep") == 0
    text = (tmp_path / "vpt-fig17.md").read_text()
    assert "linear on eurosat" in text and "vpt-deep, length 10 on eurosat" in text
    assert "| 10 | **31.6** |" in text and "| 1 | 10.0 |" in text
    assert not [row for row in Results(tmp_path / "results.csv").rows() if row["stage"] == "final"]


def test_what_no_family_has_is_left_out(vtab, tmp_path, capsys):
    roles = ["--backbone", "convnext=convnext_atto", "--backbone", "resnet=resnet18"]
    assert main(["vpt-6", *roles, "--data", str(vtab), "--out", str(tmp_path / "out"), "--quick"]) == 0
    said = capsys.readouterr().out
    assert "not in the library, left out: convnext_atto (no family of models has a ConvNeXt)" in said
    assert "VPT (not in the library)" in said and not (tmp_path / "out" / "results.csv").exists()


def test_segmentation_has_the_papers_numbers(tmp_path, capsys):
    assert main(["vpt-4", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "vpt-4.md").read_text()
    assert "not in the library: a segmentation model" in capsys.readouterr().out
    assert "| mIoU, single scale | - (48.31) |" in text and text.count("(not in the library)") == 5


def line_of(request, row, implementation, **values):
    """A line of costs, made up."""
    key = cost.key_of(row.name, implementation, vpt_cost.case_of(request, row))
    return key | dict.fromkeys(cost.VALUES, "64") | {name: str(value) for name, value in values.items()}


def test_costs_are_laid_out_from_their_file(tmp_path, capsys):
    chosen = request_of("vpt-12", tmp_path, [])
    by_name = {row.name: row for row in chosen.rows}
    made = [
        line_of(chosen, by_name[name], who, train_ms=8 * rank, tuned_over_total=0.5)
        for name in ("linear", "vpt-deep:p=200")
        for rank, who in enumerate(cost.IMPLEMENTATIONS, start=1)
    ]
    for line in made:
        cost._append(tmp_path / cost.FILE, line)
    asked = ["vpt-12", "--backbone", TINY, "--out", str(tmp_path), "--quick", "--seeds", "2", "--tabulate"]
    assert main(asked) == 0
    kept = (tmp_path / "vpt-12.md").read_bytes(), (tmp_path / "vpt-12.tex").read_bytes()
    text = kept[0].decode()
    deep = next(line for line in text.splitlines() if line.startswith("| vpt-deep, p = 200 "))
    # Batches of four: 8 and 16 ms are 2 and 4 an image; the paper's 360.1 ms are those of a batch of 64.
    assert [cell.strip() for cell in deep.split("|")][3] == "2.00" and "| 4.00 |" in deep and "| 5.63 |" in deep
    assert "sidetune (not in the library)" in text and "0.50 (2.19" in deep
    said = capsys.readouterr().out
    assert "Protocol: quick, thinned to a few turns of small batches." in text and "0 tasks; quick, thinned" in said
    assert main(asked) == 0
    assert ((tmp_path / "vpt-12.md").read_bytes(), (tmp_path / "vpt-12.tex").read_bytes()) == kept


def test_costs_are_measured_once(tmp_path, monkeypatch):
    case = cost.Case({"name": "linear"}, "vit_tiny_patch16_224", 32, 2, 3, "fp32")
    asked = []

    def answer(case, *what):
        asked.append(what)
        if what == ("times",):
            return {name: {"tuned_over_total": 1.0, "train_ms": 2.0, "test_ms": 1.0} for name in cost.IMPLEMENTATIONS}
        return 10.0

    monkeypatch.setattr(cost, "_ask", answer)
    with pytest.raises(ValueError):
        # A field that is missing is a fault of the program, and nothing is written.
        cost._append(tmp_path / "none.csv", {"unknown": "1"})
    full = answer
    monkeypatch.setattr(
        cost, "_ask",
        lambda case, *what: {n: v | dict.fromkeys(TIMES, 1.0) for n, v in full(case, *what).items()}
        if what == ("times",) else full(case, *what),
    )  # fmt: skip
    for _ in range(2):
        cost.measure("linear", case, tmp_path / cost.FILE, lambda text: None)
    assert len(asked) == 5 and len(cost.lines(tmp_path / cost.FILE)) == 2
    # The beginning of a line that a killed process left is measured again.
    whole = (tmp_path / cost.FILE).read_bytes()
    (tmp_path / cost.FILE).write_bytes(whole[:-5])
    cost.measure("linear", case, tmp_path / cost.FILE, lambda text: None)
    assert (tmp_path / cost.FILE).read_bytes() == whole
    (tmp_path / "other.csv").write_text("a,b\n")
    with pytest.raises(TableError, match=r"other\.csv: its columns are not those"):
        cost.lines(tmp_path / "other.csv")


TIMES = [name for name in cost.VALUES if name.endswith("ms")]


@pytest.mark.parametrize("implementation", cost.IMPLEMENTATIONS)
def test_the_work_that_is_measured(implementation):
    case = cost.Case({"name": "vpt", "length": 2, "dropout": 0.0}, "vit_tiny_patch16_224", 32, 2, 1, "fp32")
    work = cost.Work(case, implementation, torch.device("cpu"))
    # 24 prompts and 100 classes of width 192, against the backbone without head.
    trained = 12 * 2 * 192 + 193 * 100
    backbone = 5_524_416 - (196 - 4) * 192  # with the position table of four patches
    assert work.tuned_over_total == pytest.approx(100 * trained / backbone, rel=1e-4)
    before = float(work.step("train")())
    assert float(work.step("train")()) < before
    assert work.step("test")().shape == (2, 100) and work.resident_bytes > 4 * backbone
