"""Cutting columns: the same gradients as torch's split, joined without a copy where they lie side by side."""

from __future__ import annotations

import pytest
import torch

from fastpeft.ops.split_columns import split_columns


def gradient_of(parts_of, y, gradients):
    parts = parts_of(y)
    pairs = [(part, g) for part, g in zip(parts, gradients, strict=True) if g is not None]
    return torch.autograd.grad([p for p, _ in pairs], y, [g for _, g in pairs])[0]


@pytest.mark.parametrize("splits", [[4, 4, 4], [2, 7, 3], [12]])
@pytest.mark.parametrize("missing", [None, 0])
def test_as_torchs_split(splits, missing):
    y = torch.randn(2, 5, 12, requires_grad=True)
    gradients = [torch.randn(2, 5, width) for width in splits]
    if missing is not None and len(splits) > 1:
        gradients[missing] = None
    expected = gradient_of(lambda t: t.split(splits, dim=-1), y, gradients)
    assert torch.equal(gradient_of(lambda t: split_columns(t, splits), y, gradients), expected)


def test_neighbours_are_joined_without_a_copy():
    y = torch.randn(2, 5, 12, requires_grad=True)
    whole = torch.randn(2, 5, 12)
    found = gradient_of(lambda t: split_columns(t, [4, 4, 4]), y, whole.split(4, dim=-1))
    assert found.data_ptr() == whole.data_ptr() and torch.equal(found, whole)


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1), (0, 0, 2)])
def test_parts_of_one_tensor_in_another_order_are_not_taken_for_it(order):
    y = torch.randn(2, 5, 12, requires_grad=True)
    parts = torch.randn(2, 5, 12).split(4, dim=-1)
    gradients = [parts[i] for i in order]
    found = gradient_of(lambda t: split_columns(t, [4, 4, 4]), y, gradients)
    assert torch.equal(found, torch.cat(gradients, dim=-1))


def test_rows_of_a_larger_tensor_are_not_taken_for_the_whole():
    y = torch.randn(2, 5, 12, requires_grad=True)
    larger = torch.randn(2, 6, 12)
    gradients = larger[:, 1:].split(4, dim=-1)
    assert torch.equal(gradient_of(lambda t: split_columns(t, [4, 4, 4]), y, gradients), larger[:, 1:])
