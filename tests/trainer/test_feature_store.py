"""Features on disk: what they are named by, that a folder stays small, and what happens when it cannot be used."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastpeft.trainer import feature_store
from fastpeft.trainer.feature_store import FeatureStore


def features(seed=0, rows=10, dtype=torch.bfloat16):
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Counted:
    """A computation that counts how often it was needed."""

    def __init__(self, result):
        self.result, self.calls = result, 0

    def __call__(self):
        self.calls += 1
        return self.result


@pytest.fixture
def store(tmp_path):
    said = []
    found = FeatureStore(tmp_path / "features", limit=2**20, warn=said.append)
    object.__setattr__(found, "said", said)
    return found


def files(store):
    return sorted(path.name for path in store.folder.glob("*") if path.is_file())


def fetch(store, name, compute):
    return store.fetch(lambda: {"name": name, "shape": (1, 2)}, compute)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_computed_once_and_read_as_they_were(store, dtype):
    compute = Counted(features(dtype=dtype))
    for _ in range(3):
        found = fetch(store, "a", compute)
        assert torch.equal(found, compute.result) and found.dtype == dtype
    assert compute.calls == 1
    assert fetch(store, "b", Counted(features(1))).equal(features(1))
    assert len(files(store)) == 2 and all(name.endswith(".safetensors") for name in files(store)) and not store.said


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "other", "text"])
def test_damaged_files_are_computed_again_and_said(store, harm):
    compute = Counted(features())
    fetch(store, "a", compute)
    (path,) = store.folder.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[-3] ^= 1
    elif harm == "other":
        fetch(store, "b", Counted(features(1)))
        content = next(p for p in store.folder.glob("*.safetensors") if p != path).read_bytes()
    path.write_bytes({"cut": content[:-5], "empty": b"", "text": b"x" * 40}.get(harm, bytes(content)))
    for _ in range(2):
        assert torch.equal(fetch(store, "a", compute), compute.result)
    assert compute.calls == 2
    assert len(store.said) == 1 and store.said[0].startswith(f"damaged features are computed again: {path}: ")
    assert "\n" not in store.said[0]


def test_the_least_recently_used_go_first(store):
    names = {}
    for age, name in enumerate("abc"):
        before = set(files(store))
        fetch(store, name, Counted(features(rows=20)))
        (names[name],) = set(files(store)) - before
        os.utime(store.folder / names[name], (age, age))
    size = (store.folder / names["a"]).stat().st_size
    small = FeatureStore(store.folder, limit=3 * size + 500, warn=store.warn)
    # Reading makes it the latest.
    fetch(small, "a", Counted(None))
    fetch(small, "d", Counted(features(rows=20)))
    assert names["a"] in files(small) and names["c"] in files(small) and names["b"] not in files(small)
    assert len(files(small)) == 3 and not store.said


def test_what_is_larger_than_the_folder_may_be_is_not_kept(store):
    tiny = FeatureStore(store.folder, limit=10, warn=store.warn)
    compute = Counted(features())
    for _ in range(2):
        assert fetch(tiny, "a", compute).equal(compute.result)
    assert compute.calls == 2 and files(tiny) == []
    assert "features not kept: 0.00 GiB are more than" in store.said[0]


def test_a_full_disk_costs_nothing_but_the_file(store, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    fetch(store, "a", Counted(features()))
    kept = files(store)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        compute = Counted(features(1))
        assert fetch(store, "b", compute).equal(compute.result)
    assert files(store) == kept and "cannot be written: No space left on device" in store.said[0]
    with monkeypatch.context() as patch:
        patch.setattr(feature_store, "RESERVE", 2**60)
        assert fetch(store, "b", compute).equal(compute.result)
    assert files(store) == kept and "free on the disk of" in store.said[1]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")
def test_a_disk_that_fills_up_while_a_file_is_written(store, monkeypatch):
    from safetensors import torch as safetensors

    save_file = safetensors.save_file
    monkeypatch.setattr(safetensors, "save_file", lambda tensors, path, about: save_file(tensors, "/dev/full", about))
    compute = Counted(features())
    assert fetch(store, "a", compute).equal(compute.result)
    assert files(store) == [] and len(store.said) == 1
    assert "cannot be written" in store.said[0] and "\n" not in store.said[0]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    said, compute = [], Counted(features())
    store = FeatureStore(tmp_path / "file" / "features", warn=said.append)
    assert fetch(store, "a", compute).equal(compute.result)
    assert compute.calls == 1 and "cannot be used: Not a directory" in said[0]


def test_data_that_change_while_they_are_encoded_are_not_kept(store):
    state = {"version": 1}

    def compute():
        state["version"] = 2
        return features()

    assert store.fetch(lambda: dict(state), compute).equal(features())
    assert files(store) == [] and "images or weights have changed" in store.said[0]


def test_one_of_several_computes_and_the_others_read(store):
    release, compute = threading.Event(), Counted(features())

    def slowly():
        release.wait(60)
        return compute()

    with ThreadPoolExecutor(3) as pool:
        found = [pool.submit(fetch, store, "a", slowly) for _ in range(3)]
        time.sleep(0.3)
        assert not any(one.done() for one in found)
        # Another name waits for nobody.
        assert fetch(store, "b", Counted(features(1))).equal(features(1))
        release.set()
        assert all(one.result().equal(compute.result) for one in found)
    assert compute.calls == 1


def test_a_killed_process_holds_nobody_up(store):
    fork = multiprocessing.get_context("fork")
    computing = fork.Event()

    def stuck():
        (store.folder / f"{'0' * 32}.unfinished").write_bytes(b"x" * 100)
        computing.set()
        time.sleep(600)

    process = fork.Process(target=fetch, args=(store, "a", stuck))
    process.start()
    assert computing.wait(60)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(fetch, store, "a", Counted(features()))
        time.sleep(0.3)
        assert not found.done(), "it waits"
        os.kill(process.pid, signal.SIGKILL)
        assert found.result(60).equal(features())
    process.join()
    # What it left of a file went when room was made for the next.
    assert not list(store.folder.glob("*.unfinished"))
