"""Memory that is kept between steps: handed out once at a time, given back, forgotten when shapes are over."""

from __future__ import annotations

import gc

import pytest
import torch

from fastpeft.native import memory
from fastpeft.native.memory import Pool

MIB = 1 << 20


@pytest.fixture
def pool():
    return Pool()


def test_a_piece_comes_back_when_the_last_view_is_gone(pool):
    a = pool.empty(MIB, dtype=torch.float32)
    address, part = a.data_ptr(), a[5:7].view(torch.int32)
    b = pool.empty(MIB, dtype=torch.float32)
    assert b.data_ptr() != address
    del a
    gc.collect()
    assert pool.free_bytes == 0
    del part
    assert pool.free_bytes == 4 * MIB
    c = pool.empty(2, MIB, dtype=torch.bfloat16)
    assert c.data_ptr() == address and c.shape == (2, MIB) and c.dtype == torch.bfloat16


def test_what_autograd_keeps_is_in_use(pool):
    x = torch.ones(MIB, requires_grad=True)
    kept = pool.empty(MIB, dtype=torch.float32).fill_(3.0)
    y = (x * kept).sum()
    del kept
    other = pool.empty(MIB, dtype=torch.float32).fill_(0.0)
    y.backward()
    assert (x.grad == 3).all() and not other.any()
    del y
    assert pool.free_bytes == 4 * MIB


def test_small_tensors_are_torchs_own(pool):
    assert pool.empty(10, dtype=torch.float32).shape == (10,)
    assert pool.free_bytes == 0 and not pool._used


def test_sizes_that_nobody_wants_any_more_are_given_back(pool, monkeypatch):
    monkeypatch.setattr(memory, "_STALE", 3)
    del_me = pool.empty(2 * MIB, dtype=torch.uint8)
    del del_me
    for size in (4, 6, 8):
        pool.empty(size * MIB, dtype=torch.uint8)
    assert pool.free_bytes == (2 + 4 + 6 + 8) * MIB
    pool.empty(10 * MIB, dtype=torch.uint8)
    assert pool.free_bytes == (4 + 6 + 8 + 10) * MIB
    pool.clear()
    assert pool.free_bytes == 0


def test_tensors_outlive_the_pool():
    a = Pool().empty(MIB, dtype=torch.float32).fill_(2.0)
    gc.collect()
    assert (a == 2).all()
