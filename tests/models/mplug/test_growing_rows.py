"""Keys and values with room for more: as if they were put together anew each time."""

from __future__ import annotations

import pytest
import torch

from fastpeft.models.mplug.stream import GrowingRows


def rows(samples: int, count: int, **options) -> torch.Tensor:
    return torch.randn(samples, 2, count, 4, **options)


@torch.no_grad()
@pytest.mark.parametrize("strided", [False, True])
def test_adding_and_reordering_is_concatenation_and_selection(strided):
    table, expected = GrowingRows(), None
    for step in range(40):
        samples = 3 if expected is None else len(expected)
        new = rows(samples, 1 + step % 3)
        if strided:
            new = new.transpose(1, 2).contiguous().transpose(1, 2)
        expected = new if expected is None else torch.cat((expected, new), 2)
        assert torch.equal(table.extend(new), expected) and torch.equal(table.rows, expected)
        if step % 4 != 3:
            index = torch.randint(samples, (5 if step < 20 else 2,))
            table.reorder(index)
            expected = expected[index]
            assert torch.equal(table.rows, expected)


@torch.no_grad()
def test_what_was_given_out_is_not_written_over_by_more_rows():
    table = GrowingRows()
    first = table.extend(rows(2, 3))
    second = table.extend(rows(2, 1))
    kept = first.clone(), second.clone()
    third = table.extend(rows(2, 1))
    assert torch.equal(first, kept[0]) and torch.equal(second, kept[1])
    assert third.data_ptr() == second.data_ptr() != first.data_ptr()


@torch.no_grad()
def test_two_tensors_take_turns():
    table = GrowingRows()
    table.extend(rows(3, 4))
    places = []
    for _ in range(3):
        table.extend(rows(3, 1))
        table.reorder(torch.tensor([2, 0, 0]))
        places.append(table.rows.data_ptr())
    assert places[0] == places[2] != places[1]


def test_gradients_reach_all_rows():
    table, parts = GrowingRows(), [rows(2, 2, requires_grad=True) for _ in range(3)]
    index = torch.tensor([1, 1])
    for part in parts:
        table.extend(part)
        table.reorder(index)
    (table.rows * torch.arange(6.0)[:, None]).sum().backward()
    for number, part in enumerate(parts):
        # The first sample is dropped at once.
        assert torch.equal(part.grad[0], torch.zeros(2, 2, 4))
        expected = 2 * torch.arange(2.0 * number, 2 * number + 2)[:, None].expand(2, 2, 4)
        assert torch.equal(part.grad[1], expected)


def test_rows_of_inference_mode_grow_outside_of_it():
    table = GrowingRows()
    with torch.inference_mode():
        table.extend(rows(2, 2))
        table.extend(rows(2, 2))
        table.reorder(torch.tensor([1, 0]))
        table.extend(rows(2, 1))
    with torch.no_grad():
        before, new = table.rows.clone(), rows(2, 1)
        assert torch.equal(table.extend(new), torch.cat((before, new), 2))
        table.reorder(torch.tensor([1, 0]))
        assert torch.equal(table.rows, torch.cat((before, new), 2)[[1, 0]])
