"""VTAB-1k's folder layout, written so that an unfinished task folder is never taken for a finished one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fastpeft.data import DataError

SPLITS = ("train800", "val200", "test")
_NOTE = "made.json"


def claim(folder: Path, how: Mapping[str, object]) -> None:
    """Take a task's folder for what is about to be written, or take it up again after an interruption.

    Args:
        folder: of the task; made if it is not there.
        how: everything that decides what is written; kept in the folder.

    Raises:
        DataError: the folder holds something that was not made in this way.
    """
    note = folder / _NOTE
    text = json.dumps(dict(how), sort_keys=True) + "\n"
    if note.is_file():
        if note.read_text(encoding="utf-8") != text:
            raise DataError(f"{note}: made as {note.read_text(encoding='utf-8').strip()}, asked for {text.strip()}; "
                            "choose another --out or remove the folder")  # fmt: skip
    elif folder.is_dir() and any(folder.iterdir()):
        raise DataError(f"{folder}: not empty, and not made by this command; choose another --out")
    else:
        write_file(note, lambda part: _write(part, text))


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Have a file written whole or not at all.

    Args:
        path: the file; its folder is made.
        write: writes the file that it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_lists(
    folder: Path, samples: Mapping[str, Sequence[tuple[str, int]]], classes: Sequence[str] | None = None
) -> None:
    """Write a task's lists: train800, val200, test, and train800val200 from the first two.

    Call it when all images are there: a folder without lists is refused by every reader.

    Args:
        folder: of the task.
        samples: for each of `SPLITS` the images' paths, relative to the folder, and their labels.
        classes: names in label order, for `classes.txt`.
    """
    everything = dict(samples) | {"train800val200": [*samples["train800"], *samples["val200"]]}
    texts = {name: "".join(f"{path} {label}\n" for path, label in lines) for name, lines in everything.items()}
    if classes is not None:
        texts["classes"] = "".join(f"{name}\n" for name in classes)
    for name, text in texts.items():
        write_file(folder / f"{name}.txt", lambda part, text=text: _write(part, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
