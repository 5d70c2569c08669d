"""Linear layers that other libraries wrap: how the engine looks inside them.

Every module of this package defines `REQUIRES`, the library's module without which such a layer cannot exist, and
`register()`, which tells the engine about its classes. Adding a file adds a wrapper.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys


def register_all() -> None:
    """Register the wrappers of the libraries that are loaded."""
    for info in pkgutil.iter_modules(__path__):
        wrapper = importlib.import_module(f"{__name__}.{info.name}")
        if wrapper.REQUIRES in sys.modules:
            wrapper.register()
