"""Which image is seen when."""

from __future__ import annotations

import pytest
import torch

from fastpeft.trainer.features import Features
from fastpeft.trainer.order import Deal, evaluation_batches, mix, parts_of, training_batches


class Numbers(torch.utils.data.Dataset):
    """Item i is (i, i % 3)."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int):
        return torch.tensor([float(index)]), index % 3


def seen(deal: Deal, world: int, epoch: int, step: int, epochs: int) -> list[list[int]]:
    """By rank, the images that count, in order."""
    found = []
    for rank in range(world):
        batches = training_batches(Numbers(deal.size), parts_of(deal, rank, world, epoch, step, epochs), workers=0)
        found.append([int(image) for images, _, counted in batches for image in images[:counted]])
    return found


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (2, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize("size", [16, 17, 19, 23])
def test_every_image_counts_once_an_epoch(world, accumulation, size):
    deal = Deal(size, 8, seed=0, drop_last=False, parts=world * accumulation)
    ranks = seen(deal, world, 0, 0, epochs=1)
    assert sorted(image for rank in ranks for image in rank) == list(range(size))
    assert max(map(len, ranks)) - min(map(len, ranks)) <= deal.steps


def test_every_rank_computes_something_in_every_micro_batch():
    # The last step has one image for four micro-batches.
    deal = Deal(9, 8, seed=0, drop_last=False, parts=4)
    for rank in range(2):
        parts = list(parts_of(deal, rank, 2, 0, 0, epochs=1))
        assert len(parts) == deal.steps * 2 and all(part.keys for part in parts)
    counted = [part.counted for rank in range(2) for part in parts_of(deal, rank, 2, 0, 1, epochs=1)]
    assert sorted(counted) == [0, 0, 0, 1]


def test_a_position_is_enough_to_continue():
    deal = Deal(21, 4, seed=5, drop_last=False, parts=2)
    (whole,) = seen(deal, 1, 0, 0, epochs=3)
    (rest,) = seen(deal, 1, 1, 4, epochs=3)
    assert whole[21 + 16 :] == rest


def test_epochs_and_seeds_differ_and_repeat():
    deal = Deal(50, 8, seed=1, drop_last=False, parts=1)
    assert deal.order(0) == deal.order(0) != deal.order(1)
    assert deal.order(0) != Deal(50, 8, seed=2, drop_last=False, parts=1).order(0)
    assert len({mix(a, b) for a in range(30) for b in range(30)}) == 900


def test_a_smaller_last_batch_can_be_left_out():
    assert Deal(19, 8, seed=0, drop_last=False, parts=1).steps == 3
    dropped = Deal(19, 8, seed=0, drop_last=True, parts=1)
    assert dropped.steps == 2 and len(seen(dropped, 1, 0, 0, 1)[0]) == 16
    assert dropped.smallest_part() == 8
    assert Deal(17, 8, seed=0, drop_last=False, parts=1).smallest_part() == 1


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_image_once(world):
    found = [
        int(image)
        for rank in range(world)
        for images, _ in evaluation_batches(Numbers(10), 3, rank, world, workers=0)
        for image in images
    ]
    assert sorted(found) == list(range(10))


def test_features_in_memory_come_in_the_same_batches_without_a_loader(monkeypatch):
    class Plain(torch.utils.data.Dataset):
        def __len__(self):
            return len(held)

        def __getitem__(self, index):
            return held.features[index], held.labels[index]

    held = Features(torch.randn(19, 5, 2), [index % 3 for index in range(19)])
    deal = Deal(19, 8, seed=0, drop_last=False, parts=4)
    found = []
    for dataset in (Plain(), held):
        if dataset is held:
            monkeypatch.setattr("fastpeft.trainer.order._loader", None)
        for rank in range(2):
            dealt = list(training_batches(dataset, parts_of(deal, rank, 2, 0, 1, epochs=2), workers=0))
            found.append(dealt + [(*batch, 0) for batch in evaluation_batches(dataset, 4, rank, 2, workers=0)])
    for loaded, at_once in zip(found[:2], found[2:], strict=True):
        assert len(loaded) == len(at_once) > 10
        for (x, y, counted), (features, labels, count) in zip(loaded, at_once, strict=True):
            assert torch.equal(features, x) and torch.equal(labels, y) and labels.dtype == y.dtype and count == counted
