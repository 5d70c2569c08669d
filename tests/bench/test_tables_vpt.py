"""The tables of the VPT paper: rows, roles of backbones, plans of runs, and layouts from rows that are made up."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

pytest.importorskip("optuna")

from bench.tables import backbones, cells
from bench.tables.__main__ import main
from bench.tables.errors import TableError
from bench.tables.job import Backbone, Job
from bench.tables.papers import tables
from bench.tables.protocol import ROWS, Protocol, batch_size, method
from bench.tables.request import backbones_of
from bench.tables.results import FIELDS, KEY, Results
from bench.tables.spec import Request
from bench.tables.tasks import TASKS

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
def test_a_table_is_laid_out_from_its_results_alike_each_time(name, vtab, tmp_path, capsys):
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
        (vtab / task.folders[0]).exists() or (vtab / task.folders[0]).symlink_to(vtab / "eurosat")
    asked = command(name, vtab, out, "--quick", "--seeds", "2", "--tabulate")
    kept = []
    for _ in range(2):
        assert main(asked) == 0
        kept.append({path.name: path.read_bytes() for path in out.glob(f"{name}.*")})
        for path in out.glob(f"{name}.*"):
            path.unlink()
    assert set(kept[0]) == {f"{name}.md", f"{name}.tex"} and kept[0] == kept[1]
    said = capsys.readouterr().out
    assert "Of another backbone, image size or protocol" in said
    assert ("**" in said) == (name not in TESTS)
    text = kept[0][f"{name}.md"].decode()
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1 or name in ("vpt-fig3",)
    latex = kept[0][f"{name}.tex"].decode()
    assert latex.count("{") == latex.count("}")
    for row in spec.rows:
        if row.missing:
            assert f"{row.title or row.name} (not in the library)" in text
