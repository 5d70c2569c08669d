"""Class folders."""

from __future__ import annotations

import pytest

from fastpeft.data import DataError
from fastpeft.data.folder import open_folder
from tests.data.files import write_folders, write_image


def test_classes_are_the_sorted_training_folders(tmp_path):
    write_folders(tmp_path, {"train": {"b": 2, "a": 1}, "val": {"b": 1}, "test": {"a": 1, "b": 3}})
    sources, names = open_folder(tmp_path)
    assert names == ["a", "b"]
    assert sources["train"].labels == [0, 1, 1]
    assert sources["val"].labels == [1]
    assert sources["test"].labels == [0, 1, 1, 1]


def test_without_test_the_val_images_are_the_test(tmp_path):
    write_folders(tmp_path, {"train": {"a": 1}, "val": {"a": 2}})
    sources, _ = open_folder(tmp_path)
    assert sorted(sources) == ["test", "train"]
    assert len(sources["test"].labels) == 2


def test_only_image_files_count(tmp_path):
    write_folders(tmp_path, {"train": {"a": 1}, "test": {"a": 1}})
    (tmp_path / "train" / "a" / "notes.txt").write_text("x")
    write_image(tmp_path / "train" / "a" / "deeper" / "B.JPG")
    sources, _ = open_folder(tmp_path)
    assert [path.name for path in sources["train"].paths] == ["0.png", "B.JPG"]


def test_new_class_outside_train_is_an_error(tmp_path):
    write_folders(tmp_path, {"train": {"a": 1}, "test": {"a": 1, "z": 1}})
    with pytest.raises(DataError, match=r"test/z: this class has no folder under train/, which has: a"):
        open_folder(tmp_path)


def test_class_folders_alone_give_a_fifth_for_testing(tmp_path):
    write_folders(tmp_path, {"ape": {"": 10}, "bee": {"": 3}})
    (tmp_path / "notes.txt").write_text("x")
    sources, names = open_folder(tmp_path)
    assert names == ["ape", "bee"] and sorted(sources) == ["test", "train"]
    assert (sources["test"].labels, sources["train"].labels) == ([0, 0, 1], [0] * 8 + [1] * 2)
    assert not set(sources["test"].paths) & set(sources["train"].paths)
    assert sources["test"].paths == open_folder(tmp_path)[0]["test"].paths
    write_folders(tmp_path, {"cat": {"": 1}})
    with pytest.raises(DataError, match="cat: 1 images; at least two are needed"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    "splits, message",
    [
        ({}, "expected a folder with train/"),
        ({"train": {}}, "expected a folder with train/"),
        ({"train": {"a": 1}}, "neither test/ nor val/"),
        ({"train": {"a": 0}, "test": {"a": 1}}, "no image files"),
    ],
)
def test_incomplete_data_sets(tmp_path, splits, message):
    write_folders(tmp_path, splits)
    with pytest.raises(DataError, match=message):
        open_folder(tmp_path)


def test_train_without_classes(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="no class folders"):
        open_folder(tmp_path)
