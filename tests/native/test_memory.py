"""Memory that is kept between steps: handed out once at a time, given back, forgotten when shapes are over."""

from __future__ import annotations

import gc
import itertools
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastpeft.native import memory
from fastpeft.native.memory import Arena, Pool

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


def test_an_arena_puts_pieces_side_by_side(monkeypatch):
    made = []
    inner = memory._map
    monkeypatch.setattr(memory, "_map", lambda size: made.append(size) or inner(size))
    arena = Arena()
    pieces = [arena.empty(1 << 10, 1 << 10, dtype=torch.bfloat16) for _ in range(20)]
    pieces += [arena.empty(40 << 20, dtype=torch.uint8), arena.empty((1 << 20) + 1, dtype=torch.uint8)]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in pieces)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert all(begin % 64 == 0 for begin, _ in spans)
    # Twenty pieces of 2 MiB, one that is larger than a mapping, and one more.
    assert [size >> 20 for size in made] == [32, 32, 40, 32]
    for number, t in enumerate(pieces):
        t.fill_(number)
    assert all(bool((t == number).all()) for number, t in enumerate(pieces))
    assert arena.empty(16, dtype=torch.float32).untyped_storage().nbytes() == 64


def test_an_arenas_mapping_goes_with_its_last_tensor(monkeypatch):
    made = []
    inner = memory._map
    monkeypatch.setattr(memory, "_map", lambda size: made.append(weakref.ref(found := inner(size))) or found)
    arena = Arena()
    first = arena.empty(20 << 20, dtype=torch.uint8)
    second = arena.empty(20 << 20, dtype=torch.uint8)
    assert len(made) == 2
    del first
    gc.collect()
    assert made[0]() is None and made[1]() is not None
    second.fill_(1)


def test_an_arena_in_several_threads():
    arena = Arena()
    with ThreadPoolExecutor(8) as threads:
        pieces = list(threads.map(lambda _: arena.empty(1 << 20, dtype=torch.uint8), range(64)))
    assert len({t.data_ptr() for t in pieces}) == 64
