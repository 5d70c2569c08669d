"""Checkpoints on disk."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource

import pytest
import torch
from safetensors import SafetensorError

from fastpeft.trainer import checkpoint


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"param/a": torch.full((3, 2), value), "count": torch.tensor(7), "half": torch.ones(2, dtype=torch.bfloat16)}


def test_what_is_saved_is_loaded(tmp_path):
    state = {"loss": 0.1 + 0.2, "rng": {"seed": 2**62 + 1}, "history": [{"epoch": 1}]}
    path = checkpoint.save(tmp_path, 5, tensors(1.5), state)
    loaded, read = checkpoint.load(path)
    assert read == state
    assert all(
        torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype for name, value in tensors(1.5).items()
    )


def test_the_last_two_are_kept(tmp_path):
    for step in (1, 2, 10, 30):
        checkpoint.save(tmp_path, step, tensors(step), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000030"]


def test_every_byte_counts(tmp_path):
    path = checkpoint.save(tmp_path, 1, tensors(1), {"loss": 0.5, "history": []})
    for name in ("tensors.safetensors", "state.json"):
        content = (path / name).read_bytes()
        for position in range(0, len(content), 7):
            broken = bytearray(content)
            broken[position] ^= 4
            (path / name).write_bytes(broken)
            with pytest.raises(checkpoint.CheckpointError, match="step-00000001"):
                checkpoint.load(path)
        for length in (0, 1, len(content) // 2, len(content) - 1):
            (path / name).write_bytes(content[:length])
            with pytest.raises(checkpoint.CheckpointError):
                checkpoint.load(path)
        (path / name).write_bytes(content)
    checkpoint.load(path)


def test_the_newest_whole_one_is_used(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, tensors(step), {"step": step})
    (tmp_path / "step-00000002" / "state.json").write_text("{}")
    warnings = []
    _, state = checkpoint.load_latest(tmp_path, warnings.append)
    assert state == {"step": 1} and len(warnings) == 1
    assert not (tmp_path / "step-00000002").exists()


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("fastpeft.trainer.checkpoint._digest_file", OSError(errno.EIO, os.strerror(errno.EIO))),
        ("pathlib.Path.read_text", OSError(errno.EMFILE, os.strerror(errno.EMFILE))),
        ("safetensors.torch.load_file", SafetensorError("cannot allocate memory")),
    ],
)
def test_what_cannot_be_read_now_is_not_taken_for_damaged(tmp_path, monkeypatch, where, error):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, tensors(step), {"step": step})
    warnings = []

    def failing(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(where, failing)
        with pytest.raises(OSError, match="step-00000002: cannot be read"):
            checkpoint.load_latest(tmp_path, warnings.append)
    assert not warnings
    assert checkpoint.load_latest(tmp_path, print)[1] == {"step": 2}


def test_a_file_that_is_missing_is_damage(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, tensors(step), {"step": step})
    (tmp_path / "step-00000002" / "tensors.safetensors").unlink()
    warnings = []
    assert checkpoint.load_latest(tmp_path, warnings.append)[1] == {"step": 1}
    assert len(warnings) == 1


@contextlib.contextmanager
def small_files():
    """No file can grow beyond 4 KiB, which stands for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("large", ["tensors", "state"])
def test_what_cannot_be_written_leaves_the_one_before(tmp_path, large):
    checkpoint.save(tmp_path, 1, tensors(1), {"step": 1})
    more = {"large": torch.zeros(4096)} if large == "tensors" else {}
    state = {"step": 2} if large == "tensors" else {"history": ["epoch"] * 1000}
    with small_files(), pytest.raises(OSError, match="step-00000002: cannot be written: "):
        checkpoint.save(tmp_path, 2, tensors(2) | more, state)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.load_latest(tmp_path, print)[1] == {"step": 1}


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_one_of_the_same_step_is_there_until_the_new_one_is(tmp_path, monkeypatch, renamed):
    checkpoint.save(tmp_path, 4, tensors(1), {"number": 1})
    rename, done = os.rename, []

    def killed(*paths):
        if len(done) == renamed:
            raise KeyboardInterrupt
        rename(*paths)
        done.append(paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        if renamed == 2:
            patch.setattr(checkpoint, "_flush", lambda path: killed() if len(done) == 2 else None)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, 4, tensors(2), {"number": 2})
    found, state = checkpoint.load_latest(tmp_path, print)
    number = 2 if renamed == 2 else 1
    assert state == {"number": number} and torch.equal(found["param/a"], tensors(number)["param/a"])
    checkpoint.save(tmp_path, 4, tensors(3), {"number": 3})
    assert checkpoint.load_latest(tmp_path, print)[1] == {"number": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_an_unfinished_write_is_ignored_and_replaced(tmp_path):
    assert checkpoint.load_latest(tmp_path, print) is None
    leftover = tmp_path / ".unfinished"
    leftover.mkdir()
    (leftover / "tensors.safetensors").write_bytes(b"half of")
    assert checkpoint.load_latest(tmp_path, print) is None
    checkpoint.save(tmp_path, 3, tensors(3), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_small_files_are_replaced_whole(tmp_path):
    path = tmp_path / "results.json"
    checkpoint.write_text(path, json.dumps({"a": 1}))
    checkpoint.write_text(path, json.dumps({"a": 2}))
    assert json.loads(path.read_text()) == {"a": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]
