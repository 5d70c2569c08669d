"""What is wrong with a request, in one line."""

from __future__ import annotations

from fastpeft.errors import FastPEFTError


class AnalysisError(FastPEFTError):
    """An analysis that cannot be made of what was given; one line that says what was expected."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, in a line; its kind if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
