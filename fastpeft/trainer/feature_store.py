"""Features on disk: a folder of safetensors files of bounded size that any number of processes may share.

A file is named by all that its features depend on (`fastpeft.trainer.feature_key`), so an old one is never read where
anything has changed; it goes when the folder is full and others have been used since. A file is written under another
name, flushed and renamed, and checked when it is read. Whatever goes wrong with the folder costs a computation, which
is said, and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GIBIBYTE = 2**30
DEFAULT_LIMIT = 20 * GIBIBYTE
# Left free on the disk: the folder must not be why results cannot be written beside it.
RESERVE = GIBIBYTE // 2
_NAME = "features"
_ENDING, _UNFINISHED = ".safetensors", ".unfinished"


@dataclasses.dataclass(frozen=True)
class FeatureStore:
    """A folder of features.

    Attributes:
        folder: made when it is first written to.
        limit: bytes that it may hold; the least recently used go first. 0 keeps nothing.
        warn: called with one line for everything that had to be computed although it was kept, or could not be kept.
        shared: of a run's splits, the names of those that other runs read too; the others are not kept.
    """

    folder: Path
    limit: int = DEFAULT_LIMIT
    warn: Callable[[str], None] = lambda line: None
    shared: frozenset[str] = frozenset({"train", "val", "test"})

    def of(self, *shared: str) -> FeatureStore:
        """The same folder, for a run that shares these splits with others."""
        return dataclasses.replace(self, shared=frozenset(shared))

    def fetch(self, describe: Callable[[], Mapping[str, Any]], compute: Callable[[], Tensor]) -> Tensor:
        """Read features, or compute and keep them; of several processes that want the same one computes.

        Args:
            describe: gives what they depend on. Called before and after the computation: where the two differ, data
                have been changed meanwhile and nothing is kept.
            compute: gives them, a CPU tensor with one row an image.
        """
        key = describe()
        path = self.folder / f"{_name(key)}{_ENDING}"
        with self._lock(path.stem) as locked:
            if not locked:
                return compute()
            found = self._read(path, key)
            if found is not None:
                return found
            features = compute()
            if describe() != key:
                self.warn(f"features not kept: images or weights have changed while they were encoded ({path.name})")
            else:
                self._write(path, features, key)
            return features

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[bool]:
        """Hold a name's lock; False, said, where the folder cannot be used. A killed holder's is free at once."""
        file = None
        try:
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            file = (self.folder / "locks" / name).open("a")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            self.warn(f"features not kept: {self.folder} cannot be used: {error.strerror or error}")
            if file is not None:
                file.close()
            yield False
            return
        with file:
            yield True

    def _read(self, path: Path, key: Mapping[str, Any]) -> Tensor | None:
        """A whole file's features; None if there is none, or what was there is damaged and has been removed."""
        from safetensors import SafetensorError, safe_open

        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                # A copy: what is mapped from a network file system goes when another machine removes the file.
                about, features = file.metadata() or {}, file.get_tensor(_NAME).clone()
            if json.loads(about["key"]) != _plain(key) or about["sha256"] != _digest(features):
                raise ValueError("does not match its checksum")
            os.utime(path)
            return features
        except FileNotFoundError:
            # Another process has made room between the two looks.
            return None
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            self.warn(f"damaged features are computed again: {path}: {_line(error)}")
            with contextlib.suppress(OSError):
                path.unlink()
            return None

    def _write(self, path: Path, features: Tensor, key: Mapping[str, Any]) -> None:
        """Put a file into the folder, if there is room for it."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        about = {"key": json.dumps(_plain(key)), "sha256": _digest(features)}
        # The file has a header besides.
        size = features.numel() * features.element_size() + len(str(about)) + 256
        if size > self.limit:
            self.warn(
                f"features not kept: {_gigabytes(size)} are more than the {_gigabytes(self.limit)} of {self.folder}"
            )
            return
        unfinished = path.with_suffix(_UNFINISHED)
        try:
            self._make_room(size)
            free = shutil.disk_usage(self.folder).free
            if free < size + RESERVE:
                self.warn(f"features not kept: {_gigabytes(free)} free on the disk of {self.folder}")
                return
            save_file({_NAME: features.contiguous()}, unfinished, about)
            _flush(unfinished)
            os.replace(unfinished, path)
            _flush(self.folder)
        except (OSError, SafetensorError) as error:
            self.warn(f"features not kept: {path} cannot be written: {_line(error)}")
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Remove what killed processes left unfinished, and the least recently used until `size` more bytes fit."""
        with (self.folder / "locks" / "room").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            for path in self.folder.glob(f"*{_UNFINISHED}"):
                self._remove_abandoned(path)
            kept = []
            for path in self.folder.glob(f"*{_ENDING}"):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    kept.append((status.st_mtime_ns, status.st_size, path))
            total = sum(bytes_ for _, bytes_, _ in kept)
            for _, bytes_, path in sorted(kept):
                if total + size <= self.limit:
                    break
                # A process that is reading it keeps its own view of the removed file.
                path.unlink(missing_ok=True)
                total -= bytes_

    def _remove_abandoned(self, path: Path) -> None:
        """Remove an unfinished file whose writer no longer holds its lock."""
        with (self.folder / "locks" / path.stem).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            path.unlink(missing_ok=True)


def _plain(key: Mapping[str, Any]) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(key))


def _name(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def _digest(features: Tensor) -> str:
    return hashlib.sha256(features.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _line(error: BaseException) -> str:
    return " ".join((getattr(error, "strerror", None) or str(error)).split()) or type(error).__name__


def _gigabytes(size: int) -> str:
    return f"{size / GIBIBYTE:.2f} GiB"
