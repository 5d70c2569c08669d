"""What is wrong with a request, in one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from fastpeft.errors import FastPEFTError


class TableError(FastPEFTError):
    """A table, task, method or file that cannot be had: one line that says what was expected."""


def unknown(kind: str, given: str, known: Iterable[str]) -> TableError:
    """The error for a name that nobody knows, with the nearest that somebody does."""
    known = list(known)
    near = difflib.get_close_matches(given, known, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return TableError(f"unknown {kind} '{given}'; {hint}known: {', '.join(known)}")
