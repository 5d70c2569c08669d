"""What is wrong with a request, in one line."""

from __future__ import annotations

from fastpeft.errors import FastPEFTError


class AnalysisError(FastPEFTError):
    """An analysis that cannot be made of what was given; one line that says what was expected."""
