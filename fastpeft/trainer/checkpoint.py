"""Checkpoints that survive a kill at any moment: whole or not there, verified when read, never code.

A checkpoint is a folder `step-<number>` with `tensors.safetensors` and `state.json`, which holds everything else and
the digest of the tensors. It is written under another name, flushed to disk, and renamed; one of the same step is
renamed too, and removed when the new one is there.
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
_TENSORS, _STATE, _UNFINISHED, _REPLACED = "tensors.safetensors", "state.json", ".unfinished", ".replaced-"


# What a missing file is to the system. Whatever else it reports says nothing of what was written.
_NOT_A_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class CheckpointError(FastPEFTError):
    """A checkpoint that is truncated or corrupt."""


def save(folder: Path, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> Path:
    """Write a checkpoint atomically and remove all but the last two.

    Raises:
        OSError: It cannot be written; those that were there still are.
    """
    from safetensors import SafetensorError

    final, unfinished = path_of(folder, step), folder / _UNFINISHED
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        _write(unfinished, tensors, state)
        _put(unfinished, final)
    except (OSError, SafetensorError) as error:
        # A full disk has room again for what else the run writes.
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(f"{final}: cannot be written: {_why(error)}") from None
    for old in _all(folder)[KEEP:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _write(unfinished: Path, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """Fill a checkpoint's folder and bring it to the disk."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished / _TENSORS)
    body = json.dumps(state, sort_keys=True)
    digests = {"tensors": _digest_file(unfinished / _TENSORS), "state": _digest(body.encode())}
    (unfinished / _STATE).write_text(json.dumps({"digests": digests, "state": body}))
    for name in (_TENSORS, _STATE):
        _flush(unfinished / name)
    _flush(unfinished)


def _put(unfinished: Path, final: Path) -> None:
    """Give a checkpoint its name, which one of the same step may have: an evaluation is between the two."""
    replaced = final.with_name(f"{_REPLACED}{final.name}")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    os.rename(unfinished, final)
    _flush(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def recover(folder: Path) -> None:
    """Put back what a killed run had renamed to replace it, unless what replaces it is there."""
    for replaced in folder.glob(f"{_REPLACED}step-*"):
        final = folder / replaced.name.removeprefix(_REPLACED)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.rename(replaced, final)


def load(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read and verify a checkpoint.

    Raises:
        CheckpointError: It is not what was written.
        OSError: It cannot be read, and may be whole.
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
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError, *_NOT_A_FILE) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    except (OSError, SafetensorError) as error:
        # The tensors' checksum is right by the time that safetensors reads them.
        raise OSError(f"{path}: cannot be read: {_why(error)}") from None


def load_latest(folder: Path, warn: Callable[[str], None]) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The newest checkpoint that is whole; None if there is none. Each that is not is removed, with a warning.

    Raises:
        OSError: One cannot be read; it stays, and no earlier one is taken for it.
    """
    recover(folder)
    for path in _all(folder):
        try:
            return load(path)
        except CheckpointError as error:
            warn(f"damaged checkpoint removed, continuing from an earlier one: {error}")
            shutil.rmtree(path, ignore_errors=True)
    return None


def path_of(folder: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return folder / f"step-{step:08d}"


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


def _why(error: Exception) -> str:
    """Without the file, which is named beside it."""
    return getattr(error, "strerror", None) or str(error)


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
