"""Tables that are not of a square grid are refused, in one line."""

from __future__ import annotations

import pytest
import torch

from fastpeft import FastPEFTError
from fastpeft.models.mplug.positions import resize_positions


def test_the_same_size_is_the_same_table():
    table = torch.randn(1, 10, 3)
    assert resize_positions(table, 3, "x") is table


def test_half_precision_is_interpolated_in_single():
    table = torch.randn(1, 17, 5).half()
    resized = resize_positions(table, 7, "x")
    assert resized.dtype == torch.float16
    assert torch.equal(resized, resize_positions(table.float(), 7, "x").half())


@pytest.mark.parametrize("shape", [(1, 6, 4), (1, 0, 4), (1, 1, 4), (10, 4), (2, 10, 4)])
def test_odd_tables(shape):
    with pytest.raises(FastPEFTError, match=r"^x has shape .*expected"):
        resize_positions(torch.zeros(shape), 5, "x")
