"""The CSV that holds what was measured: rows are added, never changed, and never run again."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.tables.errors import TableError

# What a row is found by, and what it says, of runs that classify.
KEY = ("task", "method", "stage", "seed", "backbone", "image_size", "protocol", "setting", "point")
VALUES = (
    "accuracy", "train_size", "trained_parameters", "backbone_parameters", "seconds", "ms_per_image", "peak_memory_mb",
    "saved_mb", "precision", "device", "version", "date",
)  # fmt: skip
FIELDS = (*KEY, *VALUES)
# Of these, what the files of earlier versions lack; there it is empty.
LATER = ("setting", "train_size", "saved_mb")

Line = dict[str, str]


@dataclass(frozen=True)
class Schema:
    """The columns of a file.

    Attributes:
        key: what a row is found by.
        values: what it says.
        score: of these, what a run is judged by: a number, higher is better.
        later: columns that the files of earlier versions lack; there they are empty.
    """

    key: tuple[str, ...]
    values: tuple[str, ...]
    score: str
    later: tuple[str, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        """All columns, in their order."""
        return (*self.key, *self.values)


CLASSIFICATION = Schema(KEY, VALUES, "accuracy", LATER)


class Results:
    """The rows of one file. Several processes may add to it."""

    def __init__(self, path: Path, schema: Schema = CLASSIFICATION) -> None:
        self.path, self.schema = path, schema
        # What was read last, by what the file was then: a grid asks for each of its runs.
        self._last: tuple[tuple[int, ...], list[Line], dict[tuple[str, ...], Line]] | None = None

    def rows(self) -> list[Line]:
        """All rows, in the order in which they came.

        Raises:
            TableError: the file is not one of these.
        """
        return [dict(row) for row in self._known()[0]]

    def _known(self) -> tuple[list[Line], dict[tuple[str, ...], Line]]:
        """All rows, and the first of each key; read again when the file is another one."""
        try:
            # Looked at before it is read: what is added in between is found the next time.
            about = self.path.stat()
        except FileNotFoundError:
            return [], {}
        stamp = (about.st_ino, about.st_size, about.st_mtime_ns)
        if self._last is None or self._last[0] != stamp:
            rows, first = self._parsed(), {}
            for row in rows:
                first.setdefault(tuple(row[name] for name in self.schema.key), row)
            self._last = stamp, rows, first
        return self._last[1:]

    def _parsed(self) -> list[Line]:
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise TableError(f"{self.path}:{line}: not text in UTF-8; repair or remove the line") from error
        # A process that was killed may have left the beginning of a line behind.
        whole = text[: text.rfind("\n") + 1]
        reader = csv.DictReader(io.StringIO(whole, newline=""))
        columns = tuple(reader.fieldnames or ())
        fields, later = self.schema.fields, self.schema.later
        if whole and columns != tuple(name for name in fields if name in columns or name not in later):
            raise TableError(f"{self.path}: its columns are not those of a result file: {','.join(fields)}")
        found = list(reader)
        for number, row in enumerate(found, start=2):
            if None in row or None in row.values():
                raise TableError(f"{self.path}:{number}: expected {len(columns)} fields; repair or remove the line")
            self._check(row, number)
        return [{name: row.get(name, "") for name in fields} for row in found]

    def _check(self, row: Line, number: int) -> None:
        """That what is read as a number, or as a setting, is one."""
        kinds = {"seed": (int, "a whole number"), self.schema.score: (float, "a number")}
        kinds["point"] = (point_of, "settings as name=number;name=number")
        for name, (kind, what) in kinds.items():
            try:
                kind(row.get(name, "0") if name != "point" else row.get(name, ""))
            except ValueError:
                raise TableError(
                    f"{self.path}:{number}: {name}: expected {what}, got {row[name]!r}; repair or remove the line"
                ) from None

    def has(self, **key: object) -> bool:
        """Whether a row has these fields."""
        return self.find(**key) is not None

    def find(self, **key: object) -> Line | None:
        """The first row with these fields."""
        wanted = {name: str(value) for name, value in key.items()}
        rows, first = self._known()
        if wanted.keys() == set(self.schema.key):
            row = first.get(tuple(wanted[name] for name in self.schema.key))
        else:
            row = next((row for row in rows if all(row[name] == value for name, value in wanted.items())), None)
        return None if row is None else dict(row)

    def score(self, line: Line) -> float:
        """What a run is judged by."""
        return float(line[self.schema.score])

    def add(self, row: Mapping[str, object]) -> None:
        """Append a row, on disk when this returns; a row with the same key that is there already stays alone.

        Raises:
            TableError: the file cannot be written, for one because the disk is full.
        """
        from filelock import FileLock

        assert row.keys() == set(self.schema.fields), row.keys() ^ set(self.schema.fields)
        line = io.StringIO(newline="")
        csv.DictWriter(line, self.schema.fields, lineterminator="\n").writerow(row)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_name(f".{self.path.name}.lock")):
                if self.has(**{name: row[name] for name in self.schema.key}):
                    return
                self._bring_up_to_date()
                self._append(line.getvalue())
        except OSError as error:
            raise TableError(f"{self.path}: cannot be written: {error.strerror or error}; nothing was lost") from error

    def _bring_up_to_date(self) -> None:
        """Give a file of an earlier version the columns that it lacks."""
        if not self.path.exists() or self.path.read_bytes().startswith(self._head()):
            return
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.schema.fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows())
        unfinished = self.path.with_name(f".{self.path.name}.unfinished")
        try:
            with unfinished.open("wb", buffering=0) as file:
                _write(file, text.getvalue().encode())
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
        unfinished.replace(self.path)

    def _append(self, line: str) -> None:
        # Without a buffer: one that a full disk did not take would be written once more by what undoes it.
        with self.path.open("a+b", buffering=0) as file:
            # What a killed process left unfinished.
            file.seek(0)
            text = file.read()
            end = text.rfind(b"\n") + 1
            file.truncate(end)
            file.seek(end)
            head = b"" if end else self._head()
            try:
                _write(file, head + line.encode())
            except OSError:
                file.truncate(end)
                raise

    def _head(self) -> bytes:
        return (",".join(self.schema.fields) + "\n").encode()


def _write(file: io.RawIOBase, text: bytes) -> None:
    """Have all of it on disk: of a nearly full one the system takes a part, and says so at the next."""
    left = memoryview(text)
    while left:
        left = left[file.write(left) :]
    os.fsync(file.fileno())


def point_text(point: Mapping[str, float]) -> str:
    """A setting as text, the same for the same setting."""
    return ";".join(f"{key}={value:g}" for key, value in sorted(point.items()))


def point_of(text: str) -> dict[str, float]:
    """The setting that a text stands for."""
    pairs = (item.split("=") for item in text.split(";") if item)
    return {key: float(value) for key, value in pairs}
