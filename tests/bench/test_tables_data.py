"""Which data a table finds in a folder, and how each is read."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("optuna")

from bench.tables.__main__ import main
from bench.tables.errors import TableError
from bench.tables.job import Backbone, Job
from bench.tables.protocol import ROWS, Protocol
from bench.tables.tasks import TASKS, data_fields, find
from fastpeft.data import DataError
from tests.data.files import write_folders, write_image


@pytest.fixture
def data(vtab):
    """VTAB tasks, one of FGVC's data sets, class folders of two kinds."""
    home = vtab / "StanfordDogs"
    for number in range(12):
        write_image(home / "Images" / f"{number}.jpg", number, (40, 30))
    names = {f"{number}.jpg": 1 + number % 2 for number in range(12)}
    for split, part in (("train", slice(0, 6)), ("val", slice(6, 8)), ("test", slice(8, 12))):
        (home / f"{split}.json").write_text(json.dumps(dict(list(names.items())[part])))
    write_folders(vtab / "pets", {"train": {"cat": 10, "dog": 10}, "test": {"cat": 2, "dog": 2}})
    write_folders(vtab / "shapes", {"round": {"": 20}, "square": {"": 20}})
    return vtab


def job(root, task, folder, stage):
    protocol, backbone = Protocol(2, 1, True, (42,)), Backbone("vit_tiny_patch16_224", "random", 32)
    point = (("base_lr", 1.0), ("weight_decay", 0.0))
    return Job(backbone, root, task, folder, ROWS["linear"], protocol, stage, point, 0)


def test_fgvc_is_found_beside_vtab(data):
    tasks, missing = find(data)
    assert {task.name: (task.group, folder) for task, folder in tasks.items()} == {
        "stanford_dogs": ("fgvc", "StanfordDogs"),
        "cifar100": ("natural", "cifar"),
        "eurosat": ("specialized", "eurosat"),
    }
    assert {"cub200", "nabirds", "oxford_flowers", "stanford_cars"} <= {task.name for task in missing}
    assert len(TASKS) == 24 and len(missing) == 21
    assert len({name for task in TASKS for name in task.folders}) == sum(len(task.folders) for task in TASKS)


def test_class_folders_are_tasks_when_they_are_asked_for(data):
    tasks, _ = find(data, ["pets", "shapes", "StanfordDogs", "stanford_dogs"])
    assert [(task.name, task.group) for task in tasks] == [
        ("pets", "other"), ("shapes", "other"), ("stanford_dogs", "fgvc"),
    ]  # fmt: skip
    with pytest.raises(TableError, match="unknown task 'shape'; did you mean 'shapes'"):
        find(data, ["shape"])


def test_each_is_read_in_its_own_way(data):
    crops = {"resize": "crop", "augment": "crop_flip"}
    listed = {"root": str(data), "protocol": "search"}
    assert data_fields(data, "cifar", "search") == {"name": "vtab", "task": "cifar", "resize": "squash", **listed}
    assert data_fields(data, "StanfordDogs", "search") == {"name": "fgvc", "task": "StanfordDogs", **listed, **crops}
    folder = {"name": "folder", "root": str(data / "pets"), **crops}
    assert data_fields(data, "pets", "search") == folder | {"val_fraction": 0.1}
    assert data_fields(data, "pets", "final") == folder | {"val_fraction": 0.0}
    write_folders(data / "pets", {"val": {"cat": 1, "dog": 1}})
    assert data_fields(data, "pets", "search") == folder | {"val_fraction": 0.0}


@pytest.mark.parametrize("folder", ["StanfordDogs", "pets", "shapes"])
def test_runs_on_them(data, tmp_path, folder):
    task = next(iter(find(data, [folder])[0]))
    for stage in ("search", "final"):
        row = job(data, task.name, folder, stage).run(tmp_path / "runs")
        assert 0 <= float(row["accuracy"]) <= 1 and row["task"] == task.name


def test_what_is_wrong_is_said_before_anything_runs(data, tmp_path, capsys):
    place = ["--backbone", "vit_tiny_patch16_224@random", "--data", str(data), "--out", str(tmp_path / "out")]
    (data / "StanfordDogs" / "test.json").write_text('{"0.jpg": 3}')
    assert main(["vpt-1", *place]) == 2
    error = capsys.readouterr().err
    assert "test.json: '0.jpg': class 3 is not one of the 2 classes" in error and error.count("\n") == 1
    (data / "StanfordDogs" / "val.json").unlink()
    with pytest.raises(DataError, match=r"val\.json: list file not found"):
        find(data)
    (data / "empty").mkdir()
    with pytest.raises(DataError, match="empty: expected a folder with train/<class>/<image files>"):
        find(data, ["empty"])
    with pytest.raises(TableError, match="no folder of a task of VTAB-1k or FGVC; it has Images, which --tasks takes"):
        find(data / "StanfordDogs")
    assert not (tmp_path / "out").exists()
