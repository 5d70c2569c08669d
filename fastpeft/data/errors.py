"""The error of everything that is wrong with data on disk."""

from __future__ import annotations

from fastpeft.errors import FastPEFTError


class DataError(FastPEFTError):
    """Images, labels or list files that cannot be used; the message names the file and what would be right."""
