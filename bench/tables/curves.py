"""Losses of a final run by epoch, kept when the run's own folder goes: a small CSV a run, below DIR/curves."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.tables import files
from bench.tables.errors import TableError
from bench.tables.results import KEY, Line

FOLDER = "curves"
FIELDS = (*KEY, "epoch", "split", "loss", "accuracy")
_SPLITS = ("train", "val", "test")


def keep(path: Path, key: Mapping[str, object], history: Sequence[Mapping[str, Any]]) -> None:
    """Write what a run's trainer noted at its epochs, whole or not at all.

    Args:
        path: the file, replaced if it is there.
        key: of the run's row in the results.
        history: an entry an epoch, with a split's loss and accuracy where they were measured.

    Raises:
        TableError: the file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n", restval="", extrasaction="ignore")
    writer.writeheader()
    for entry in history:
        for split in _SPLITS:
            if f"{split}_loss" in entry:
                accuracy = entry.get(f"{split}_accuracy")
                writer.writerow(
                    {**key, "epoch": entry["epoch"], "split": split, "loss": f"{entry[f'{split}_loss']:.6g}",
                     "accuracy": "" if accuracy is None else f"{accuracy:.6f}"}
                )  # fmt: skip
    files.write(path, text.getvalue())


def read(folder: Path) -> list[Line]:
    """The lines of all files of a folder, by name; none if there is no such folder.

    Raises:
        TableError: a file is not one of these.
    """
    found = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as lines:
            reader = csv.DictReader(lines)
            if not set(FIELDS) <= set(reader.fieldnames or ()):
                raise TableError(f"{path}: its columns are not those of a run's losses: {','.join(FIELDS)}")
            for row in reader:
                if None in row or None in row.values():
                    raise TableError(f"{path}:{reader.line_num}: expected {len(reader.fieldnames)} fields")
                found.append(row)
    return found
