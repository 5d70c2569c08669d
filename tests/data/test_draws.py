"""Training sets of other sizes than the lists have: nested, seeded, disjoint from what validates."""

from __future__ import annotations

import numpy as np
import pytest

from fastpeft.config import DataConfig
from fastpeft.data import DataError, open_splits
from fastpeft.data.draws import drawn_order, some_of_each_class
from tests.data.files import MEAN, STD, write_folders, write_image, write_vtab


@pytest.fixture
def task(tmp_path):
    """Twelve images to train on, six to validate and twenty in a pool, in three classes."""
    folder = write_vtab(tmp_path, "mine", train=12, val=6)
    lines = []
    for index in range(20):
        write_image(folder / f"pool/{index}.png", seed=9000 + index)
        lines.append(f"pool/{index}.png {index % 3}\n")
    (folder / "pool.txt").write_text("".join(lines))
    return folder


def drawn(task, protocol="search", **fields):
    data = DataConfig(name="vtab", root=str(task.parent), task="mine", protocol=protocol, **fields)
    splits = open_splits(data, 8, MEAN, STD)
    return splits.train.source, None if splits.val is None else splits.val.source


@pytest.mark.parametrize("draw", ["even", "random"])
def test_larger_draws_hold_the_smaller_and_nothing_that_validates(task, draw):
    before, held = set(), set()
    for train_size, val_size in ((4, 2), (12, 6), (16, 7), (28, 10)):
        train, val = drawn(task, train_size=train_size, val_size=val_size, pool="pool.txt", draw=draw)
        paths, validating = set(train.paths), set(val.paths)
        assert (len(paths), len(validating)) == (train_size, val_size)
        assert paths >= before and validating >= held and not paths & validating
        before, held = paths, validating
    final, none = drawn(task, "final", train_size=28, val_size=10, pool="pool.txt", draw=draw)
    assert none is None and set(final.paths) == before | held and len(final.paths) == 38


def test_what_the_lists_have_comes_before_the_pool(task):
    train, val = drawn(task, train_size=12, val_size=6, pool="pool.txt")
    assert {path.parent.name for path in train.paths} == {"train800"}
    assert {path.parent.name for path in val.paths} == {"val200"}
    assert list(train.paths) == sorted(train.paths), "the whole list, in its order"
    train, _ = drawn(task, train_size=13, val_size=6, pool="pool.txt")
    assert [path.parent.name for path in train.paths].count("pool") == 1


def test_draws_are_even_or_not_and_depend_on_the_seed():
    labels = [0] * 50 + [1] * 50
    even, random = (np.asarray(labels)[drawn_order(labels, 5, how)[:40]] for how in ("even", "random"))
    assert even.sum() == 20 and random.sum() != 20
    assert drawn_order(labels, 3, "random").tolist() == drawn_order(labels, 3, "random").tolist()
    assert drawn_order(labels, 3, "random").tolist() != drawn_order(labels, 4, "random").tolist()


def test_one_of_each_class(task):
    train, val = drawn(task, per_class=1)
    assert sorted(train.labels) == sorted(val.labels) == [0, 1, 2]
    final, _ = drawn(task, "final", per_class=1)
    assert sorted(final.labels) == [0, 0, 1, 1, 2, 2] and set(final.paths) == {*train.paths, *val.paths}
    other, _ = drawn(task, per_class=1, seed=1)
    assert other.paths != train.paths
    # A class that has fewer gives what it has.
    assert sorted(np.asarray([0, 0, 0, 1])[some_of_each_class([0, 0, 0, 1], 0, 2)]) == [0, 0, 1]


def test_a_fraction(tmp_path, task):
    assert len(drawn(task, train_fraction=0.5)[0].labels) == 6
    assert len(drawn(task, "final", train_fraction=0.1)[0].labels) == 2
    write_folders(tmp_path / "f", {"train": {"a": 20, "b": 20}, "test": {"a": 1, "b": 1}})
    splits = open_splits({"name": "folder", "root": tmp_path / "f", "train_fraction": 0.2}, 8, MEAN, STD)
    assert np.bincount(splits.train.labels).tolist() == [4, 4]
    with pytest.raises(DataError, match="'mnist' has no training split of its own"):
        open_splits({"name": "mnist", "train_fraction": 0.2}, 8, MEAN, STD)


def test_more_than_there_are(task):
    with pytest.raises(DataError, match="train_size 30 and val_size 10: the lists have 12 and 6 images, and the pool"):
        drawn(task, train_size=30, val_size=10, pool="pool.txt")
    with pytest.raises(DataError, match="no pool was given"):
        drawn(task, train_size=13, val_size=6)
    with pytest.raises(DataError, match=r"absent\.txt: list file not found"):
        drawn(task, train_size=13, val_size=6, pool="absent.txt")
    with pytest.raises(DataError, match="a list file lies in the task's folder"):
        drawn(task, train_size=13, val_size=6, pool="../pool.txt")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"name": "mnist", "per_class": 1}, r"data\.per_class draws from VTAB's lists"),
        ({"train_size": 5, "per_class": 1}, r"data\.train_size and data\.per_class both say how many"),
        ({"val_size": 5}, r"data\.val_size goes with data\.train_size"),
        ({"train_size": 5, "pool": "p.txt"}, r"data\.pool goes with"),
    ],
)
def test_fields_that_do_not_go_together(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"name": "vtab", "root": "r", "task": "t"} | fields)
