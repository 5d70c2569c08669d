"""Checkpoints on disk."""

from __future__ import annotations

import json

import pytest
import torch

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
