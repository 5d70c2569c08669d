"""Lists of objects in JSON: whatever is wrong in one is one line that names the file, the entry and the field."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastpeft.data.errors import DataError


def read_json(path: str | Path) -> Any:
    """What a JSON file holds.

    Raises:
        DataError: There is no such file, or it is not JSON.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from None


def entries(path: str | Path, values: Any, expected: str = "a list of objects") -> Iterator[Entry]:
    """The objects of a list, numbered from 0.

    Args:
        path: Where they are from, for messages.
        values: The list.
        expected: What it should be, for messages.
    """
    if not isinstance(values, list):
        raise DataError(f"{path}: expected {expected}, got {kind_of(values)}")
    for number, value in enumerate(values):
        if not isinstance(value, dict):
            raise DataError(f"{path}: entry {number}: expected an object, got {kind_of(value)}")
        yield Entry(f"{path}: entry {number}", value)


class Entry:
    """One object and where it stands; each method takes a field out of it or says what is wrong with it."""

    __slots__ = ("values", "where")

    def __init__(self, where: str, values: dict[str, Any]) -> None:
        self.where = where
        self.values = values

    def __contains__(self, field: str) -> bool:
        return self.values.get(field) is not None

    def fail(self, field: str, expected: str, got: str) -> NoReturn:
        """Raise the error of a field."""
        raise DataError(f"{self.where}: {field}: expected {expected}, got {got}")

    def get(self, field: str, kind: type | tuple[type, ...], expected: str) -> Any:
        """A field that has to be there.

        Args:
            field: Its name.
            kind: Type, or types.
            expected: The type in words.
        """
        if field not in self.values:
            raise DataError(f"{self.where}: has no field '{field}', which is {expected}")
        value = self.values[field]
        # True is an int to Python.
        if not isinstance(value, kind) or isinstance(value, bool):
            self.fail(field, expected, kind_of(value))
        return value

    def text(self, field: str) -> str:
        """A text that is not blank."""
        value = self.get(field, str, "a text")
        if not value.strip():
            self.fail(field, "a text", "a blank one")
        return value

    def whole(self, field: str) -> int:
        """A whole number."""
        return self.get(field, int, "a whole number")

    def texts(self, field: str) -> list[str]:
        """A list of at least one text, none of them blank."""
        values = self.get(field, list, "a list of texts")
        if not values:
            self.fail(field, "a list of texts", "an empty one")
        for number, value in enumerate(values):
            if not isinstance(value, str):
                self.fail(f"{field}[{number}]", "a text", kind_of(value))
            if not value.strip():
                self.fail(f"{field}[{number}]", "a text", "a blank one")
        return values

    def objects(self, field: str) -> list[Entry]:
        """A list of at least one object."""
        values = self.get(field, list, "a list of objects")
        if not values:
            self.fail(field, "a list of objects", "an empty one")
        for number, value in enumerate(values):
            if not isinstance(value, dict):
                self.fail(f"{field}[{number}]", "an object", kind_of(value))
        return [Entry(f"{self.where}: {field}[{number}]", value) for number, value in enumerate(values)]

    def one_of(self, field: str, valid: Sequence[str]) -> str:
        """A text out of a few."""
        value = self.get(field, str, f"one of {', '.join(valid)}")
        if value not in valid:
            self.fail(field, f"one of {', '.join(valid)}", repr(value))
        return value


def kind_of(value: Any) -> str:
    """A value in words, short enough for a message."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    shown = json.dumps(value) if value is None or isinstance(value, (bool, int, float, str)) else repr(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
