"""The library's errors: one base class, so that a caller can catch all of them."""

from __future__ import annotations


class FastPEFTError(ValueError):
    """Base of every error that fastpeft raises on purpose."""


class UnsupportedModelError(FastPEFTError):
    """The model, or a layer of it, is not one that the engine can run."""


class MethodError(FastPEFTError):
    """A tuning method does not fit the model, or what was asked of it cannot be done."""
