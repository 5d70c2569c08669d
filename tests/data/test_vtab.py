"""VTAB-1k folders: what is read, and what a list file may not do."""

from __future__ import annotations

import pytest

from fastpeft.data import DataError, open_splits
from fastpeft.data.vtab import open_vtab, read_list
from tests.data.files import MEAN, STD, write_image, write_vtab


def test_final_trains_on_everything(tmp_path):
    write_vtab(tmp_path, "cifar")
    sources, names = open_vtab(tmp_path, "cifar", "final")
    assert sorted(sources) == ["test", "train"]
    assert (len(sources["train"].labels), len(sources["test"].labels)) == (8, 4)
    assert sources["train"].labels == [0, 1, 2, 0, 1, 2, 0, 1]
    assert len(names) == 100, "the task's classes, also those without an image here"


def test_search_validates_on_val200(tmp_path):
    write_vtab(tmp_path, "cifar")
    sources, _ = open_vtab(tmp_path, "cifar", "search")
    assert {split: len(source.labels) for split, source in sources.items()} == {"train": 5, "val": 3, "test": 4}
    assert "train800/" in str(sources["train"].paths[0])


def test_class_names_file_counts(tmp_path):
    folder = write_vtab(tmp_path, "mine")
    (folder / "classes.txt").write_text("ape\nbee\ncat\ndog\n")
    assert open_vtab(tmp_path, "mine", "final")[1] == ["ape", "bee", "cat", "dog"]


def test_unknown_task_counts_its_labels(tmp_path):
    write_vtab(tmp_path, "mine", classes=3)
    assert open_vtab(tmp_path, "mine", "final")[1] == ["0", "1", "2"]


@pytest.mark.parametrize(
    "folder, task",
    [
        ("cifar", "cifar100"),
        ("cifar100", "cifar"),
        ("oxford_pet", "oxford_iiit_pet"),
        ("clevr_dist", "clevr_distance"),
        ("smallnorb_azi", "smallnorb_azimuth"),
    ],
)
def test_other_names_of_a_task(tmp_path, folder, task):
    write_vtab(tmp_path, folder)
    open_vtab(tmp_path, task, "final")


def test_missing_task_lists_what_is_there(tmp_path):
    write_vtab(tmp_path, "dtd")
    with pytest.raises(DataError, match=r"no folder for task 'svhn'; it has: dtd"):
        open_vtab(tmp_path, "svhn", "final")
    with pytest.raises(DataError, match="no such folder"):
        open_vtab(tmp_path / "absent", "svhn", "final")


def test_missing_list_is_named(tmp_path):
    folder = write_vtab(tmp_path)
    (folder / "test.txt").unlink()
    with pytest.raises(DataError, match=r"cifar/test\.txt: list file not found"):
        open_vtab(tmp_path, "cifar", "final")


def test_protocol_is_checked(tmp_path):
    with pytest.raises(DataError, match="expected one of search, final, got 'all'"):
        open_vtab(tmp_path, "cifar", "all")


@pytest.mark.parametrize(
    "line, message",
    [
        ("images/a.png", "expected 'relative/path label'"),
        ("images/a.png 1 2", "expected 'relative/path label'"),
        ("images/a.png one", "expected a label, a whole number from 0, got 'one'"),
        ("images/a.png -1", "expected a label"),
        ("images/a.png 1.0", "expected a label"),
        ("images/a.png ²", "expected a label"),
        ("images/a.png 3", "label 3 is out of range: the task has 3 classes, 0 to 2"),
        ("images/absent.png 1", "no such file"),
        ("images 1", "no such file"),
        ("/etc/passwd 1", "expected a path inside"),
        ("../outside.png 1", "expected a path inside"),
        ("images/../../outside.png 1", "expected a path inside"),
        ("images/link.png 1", "outside"),
        ("elsewhere/outside.png 1", "outside"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    folder = tmp_path / "task"
    write_image(folder / "images" / "a.png")
    write_image(tmp_path / "outside.png")
    (folder / "images" / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "elsewhere").symlink_to(tmp_path)
    (folder / "list.txt").write_text(f"images/a.png 0\n\n{line}\n")
    with pytest.raises(DataError) as caught:
        read_list(folder, "list.txt", classes=3)
    assert str(caught.value).startswith(f"{folder}/list.txt:3: ")
    assert message in str(caught.value)


def test_links_inside_the_folder_are_followed(tmp_path):
    """Including a task folder that is itself a link, as where data is kept on another disk."""
    folder = tmp_path / "disk" / "task"
    write_image(folder / "images" / "a.png")
    (folder / "images" / "b.png").symlink_to("a.png")
    (folder / "list.txt").write_text("images/a.png 0\nimages/b.png 1\n")
    (tmp_path / "task").symlink_to(folder)
    source = read_list(tmp_path / "task", "list.txt")
    assert source.paths == [folder / "images" / "a.png"] * 2


def test_empty_and_binary_lists(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match=r"empty\.txt: the list is empty"):
        read_list(tmp_path, "empty.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(DataError, match=r"binary\.txt: cannot be read"):
        read_list(tmp_path, "binary.txt")


def test_val_fraction_is_refused(tmp_path):
    write_vtab(tmp_path)
    data = {"name": "vtab", "root": tmp_path, "task": "cifar", "val_fraction": 0.2}
    with pytest.raises(DataError, match="protocol 'search'"):
        open_splits(data, 32, MEAN, STD)
