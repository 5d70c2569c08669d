"""The file that measured launch choices are kept in, one for each kind of chip and version of Triton.

    ${XDG_CACHE_HOME:-~/.cache}/fastpeft/launch-<digest>.json        FASTPEFT_CACHE names another folder

A chip is its compute capability and its number of multiprocessors, never its name. The file is numbers and names alone:
reading it runs nothing, and what does not have the expected form is not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from fastpeft.kernels._launch import capability_of, processors_of

try:
    import fcntl
except ModuleNotFoundError:
    # Without locks of files, the last of two writers at the same moment wins.
    fcntl = None

VARIABLE = "FASTPEFT_CACHE"
_FORMAT = 1
_warned: set[str] = set()

Chip = Mapping[str, Any]
Entries = dict[str, dict[str, Any]]


def chip_of(device: torch.device) -> Chip:
    """What choices for a device depend on besides the kernel and the shapes."""
    return {
        "kind": device.type,
        "capability": capability_of(device),
        "processors": processors_of(device),
        "triton": importlib.metadata.version("triton"),
    }


def path_of(chip: Chip) -> Path:
    """Where choices for a chip are kept, whether or not there are any."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "fastpeft")
    digest = hashlib.sha256(json.dumps(dict(chip), sort_keys=True).encode()).hexdigest()[:12]
    return Path(folder) / f"launch-{digest}.json"


def load(chip: Chip) -> Entries:
    """The entries of a chip's file by key; none, and one warning, if the file is broken or another chip's.

    An entry has "choice", a mapping of names to integers, and "source", a digest of the kernel; other fields are kept
    and ignored.
    """
    path = path_of(chip)
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _warn(path, f"cannot be read: {error}")
        return {}
    if not isinstance(data, dict) or data.get("format") != _FORMAT or not isinstance(data.get("choices"), dict):
        _warn(path, "is no file of launch choices")
        return {}
    if data.get("chip") != dict(chip):
        _warn(path, f"is for {data.get('chip')}, not for {dict(chip)}")
        return {}
    return {key: entry for key, entry in data["choices"].items() if _whole(entry)}


def _whole(entry: object) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("source"), str):
        return False
    choice = entry.get("choice")
    return isinstance(choice, dict) and all(type(value) is int for value in choice.values())


def save(chip: Chip, key: str, entry: Mapping[str, Any]) -> None:
    """Add an entry to what the file holds by now. A folder that cannot be written is one warning."""
    path = path_of(chip)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            choices = load(chip) | {key: dict(entry)}
            text = json.dumps({"format": _FORMAT, "chip": dict(chip), "choices": choices}, indent=1) + "\n"
            _replace(path, text)
    except OSError as error:
        _warn(path, f"cannot be written: {error}")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other processes from adding at the same time. Readers need not wait: the file is replaced whole."""
    with open(path.with_suffix(".lock"), "w") as lock:
        if fcntl is not None:
            # Where the file system has no locks, as above.
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _replace(path: Path, text: str) -> None:
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise


def _warn(path: Path, words: str) -> None:
    if str(path) not in _warned:
        _warned.add(str(path))
        warnings.warn(f"fastpeft's launch choices in {path} are left out: it {words}", RuntimeWarning, stacklevel=3)
