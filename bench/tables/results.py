"""The CSV that holds what was measured: rows are added, never changed, and never run again."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path

from bench.tables.errors import TableError

# What a row is found by, and what it says.
KEY = ("task", "method", "stage", "seed", "backbone", "image_size", "protocol", "setting", "point")
VALUES = (
    "accuracy", "train_size", "trained_parameters", "backbone_parameters", "seconds", "ms_per_image", "peak_memory_mb",
    "precision", "device", "version", "date",
)  # fmt: skip
FIELDS = (*KEY, *VALUES)
# Of these, what the files of earlier versions lack; there it is empty.
LATER = ("setting", "train_size")

Line = dict[str, str]


class Results:
    """The rows of one file. Several processes may add to it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[Line]:
        """All rows, in the order in which they came.

        Raises:
            TableError: the file is not one of these.
        """
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        # A process that was killed may have left the beginning of a line behind.
        whole = text[: text.rfind("\n") + 1]
        reader = csv.DictReader(io.StringIO(whole, newline=""))
        columns = tuple(reader.fieldnames or ())
        if whole and columns != tuple(name for name in FIELDS if name in columns or name not in LATER):
            raise TableError(f"{self.path}: its columns are not those of a result file: {','.join(FIELDS)}")
        found = list(reader)
        for number, row in enumerate(found, start=2):
            if None in row or None in row.values():
                raise TableError(f"{self.path}:{number}: expected {len(columns)} fields; repair or remove the line")
        return [{name: row.get(name, "") for name in FIELDS} for row in found]

    def has(self, **key: object) -> bool:
        """Whether a row has these fields."""
        return self.find(**key) is not None

    def find(self, **key: object) -> Line | None:
        """The first row with these fields."""
        wanted = {name: str(value) for name, value in key.items()}
        return next((row for row in self.rows() if all(row[name] == value for name, value in wanted.items())), None)

    def add(self, row: Mapping[str, object]) -> None:
        """Append a row, on disk when this returns; a row with the same key that is there already stays alone.

        Raises:
            TableError: the file cannot be written, for one because the disk is full.
        """
        from filelock import FileLock

        assert row.keys() == set(FIELDS), row.keys() ^ set(FIELDS)
        line = io.StringIO(newline="")
        csv.DictWriter(line, FIELDS, lineterminator="\n").writerow(row)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_name(f".{self.path.name}.lock")):
                if self.has(**{name: row[name] for name in KEY}):
                    return
                self._bring_up_to_date()
                self._append(line.getvalue())
        except OSError as error:
            raise TableError(f"{self.path}: cannot be written: {error.strerror or error}; nothing was lost") from error

    def _bring_up_to_date(self) -> None:
        """Give a file of an earlier version the columns that it lacks."""
        if not self.path.exists() or self.path.read_bytes().startswith((",".join(FIELDS) + "\n").encode()):
            return
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows())
        unfinished = self.path.with_name(f".{self.path.name}.unfinished")
        with unfinished.open("wb") as file:
            file.write(text.getvalue().encode())
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self.path)

    def _append(self, line: str) -> None:
        with self.path.open("a+b") as file:
            # What a killed process left unfinished.
            file.seek(0)
            text = file.read()
            end = text.rfind(b"\n") + 1
            file.truncate(end)
            file.seek(end)
            head = b"" if end else (",".join(FIELDS) + "\n").encode()
            try:
                file.write(head + line.encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise


def point_text(point: Mapping[str, float]) -> str:
    """A setting as text, the same for the same setting."""
    return ";".join(f"{key}={value:g}" for key, value in sorted(point.items()))


def point_of(text: str) -> dict[str, float]:
    """The setting that a text stands for."""
    pairs = (item.split("=") for item in text.split(";") if item)
    return {key: float(value) for key, value in pairs}
