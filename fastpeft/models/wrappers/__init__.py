"""Linear layers that other libraries wrap: how the engine looks inside them.

Every module of this package defines `REQUIRES`, the library's module without which such a layer cannot exist,
`register()`, which tells the engine about its classes, and `wrapped(model)`, which finds the library's layers in a
model. Adding a file adds a wrapper.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterator
from types import ModuleType

from torch import nn


def _loaded() -> Iterator[ModuleType]:
    """The wrappers of the libraries that are loaded."""
    for info in pkgutil.iter_modules(__path__):
        wrapper = importlib.import_module(f"{__name__}.{info.name}")
        if wrapper.REQUIRES in sys.modules:
            yield wrapper


def register_all() -> None:
    """Register the wrappers of the libraries that are loaded."""
    for wrapper in _loaded():
        wrapper.register()


def wrapped(model: nn.Module) -> list[tuple[str, str]]:
    """(path, description) of all layers that other libraries wrapped, fused or not; outermost ones only."""
    return [found for wrapper in _loaded() for found in wrapper.wrapped(model)]
