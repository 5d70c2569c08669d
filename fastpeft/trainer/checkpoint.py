"""Checkpoints that survive a kill at any moment: whole or not there, verified when read, never code.

A checkpoint is a folder `step-<number>` with `tensors.safetensors` and `state.json`, which holds everything else and
the digest of the tensors. It is written under another name, flushed to disk, and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastpeft.errors import FastPEFTError

KEEP = 2
_TENSORS, _STATE, _UNFINISHED = "tensors.safetensors", "state.json", ".unfinished"


class CheckpointError(FastPEFTError):
    """A checkpoint that is truncated or corrupt."""


def save(folder: Path, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> Path:
    """Write a checkpoint atomically and remove all but the last two."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / _UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished / _TENSORS)
    body = json.dumps(state, sort_keys=True)
    digests = {"tensors": _digest_file(unfinished / _TENSORS), "state": _digest(body.encode())}
    (unfinished / _STATE).write_text(json.dumps({"digests": digests, "state": body}))
    for name in (_TENSORS, _STATE):
        _flush(unfinished / name)
    _flush(unfinished)
    final = folder / f"step-{step:08d}"
    # A checkpoint of the same step is left only by a run that found it corrupt and computed it again.
    shutil.rmtree(final, ignore_errors=True)
    os.rename(unfinished, final)
    _flush(folder)
    for old in _all(folder)[KEEP:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read and verify a checkpoint.

    Raises:
        CheckpointError: It is not what was written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        record = json.loads((path / _STATE).read_text())
        digests, body = record["digests"], record["state"]
        if _digest(body.encode()) != digests["state"]:
            raise CheckpointError(f"{path / _STATE}: does not match its checksum")
        if _digest_file(path / _TENSORS) != digests["tensors"]:
            raise CheckpointError(f"{path / _TENSORS}: does not match its checksum")
        return load_file(path / _TENSORS), json.loads(body)
    except (OSError, KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path / _TENSORS}: {error}") from None


def load_latest(folder: Path, warn: Callable[[str], None]) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The newest checkpoint that is whole; None if there is none. Each that is not is removed, with a warning."""
    for path in _all(folder):
        try:
            return load(path)
        except CheckpointError as error:
            warn(f"damaged checkpoint removed, continuing from an earlier one: {error}")
            shutil.rmtree(path, ignore_errors=True)
    return None


def _all(folder: Path) -> list[Path]:
    """The finished checkpoints, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text)
    _flush(unfinished)
    os.replace(unfinished, path)
    _flush(path.parent)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest_file(path: Path) -> str:
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file.read())
        )


def _flush(path: Path) -> None:
    """Bring a file's or folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
