"""Validation scores of a run as it trained, kept when the run's own folder goes: a small CSV a run."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.tables import files
from bench.tables.errors import TableError
from bench.tables.results import Line

FOLDER = "curves"
VALUES = ("epoch", "step", "train_loss", "val_score")


def keep(path: Path, key: Mapping[str, object], history: Sequence[Mapping[str, Any]], score: str) -> None:
    """Write what a run's trainer noted, whole or not at all.

    Args:
        path: the file, replaced if it is there.
        key: of the run's row in the results.
        history: an entry an epoch, or a part of the steps.
        score: name of the validation score in an entry.

    Raises:
        TableError: the file cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, (*key, *VALUES), lineterminator="\n")
    writer.writeheader()
    for entry in history:
        writer.writerow(
            {
                **key,
                "epoch": entry["epoch"],
                "step": entry.get("step", ""),
                "train_loss": f"{entry['train_loss']:.6g}",
                "val_score": f"{entry[score]:.6f}" if score in entry else "",
            }
        )
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
            if not set(VALUES) <= set(reader.fieldnames or ()):
                raise TableError(f"{path}: its columns are not those of a run's validation: {','.join(VALUES)}")
            for row in reader:
                if None in row or None in row.values():
                    raise TableError(f"{path}:{reader.line_num}: expected {len(reader.fieldnames)} fields")
                found.append(row)
    return found
