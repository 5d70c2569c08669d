"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from bench.tables.errors import TableError


def write(path: Path, content: bytes | str) -> None:
    """Write a file in one step, its folder too if there is none; what was there is replaced.

    Raises:
        TableError: it cannot be written, for one because the disk is full; what was there is untouched.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        unfinished.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise TableError(f"{path}: cannot be written: {error.strerror or error}") from error
