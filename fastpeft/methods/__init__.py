"""Tuning methods, one file each: which parameters are new or trained, and where they enter a block.

Every file of this package that defines a `Method` with a name is found by itself.
"""

from __future__ import annotations

import importlib
import pkgutil

from fastpeft.methods.base import REGISTRY, Method, Methods, from_dict

for _info in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_info.name}")

globals().update({cls.__name__: cls for cls in REGISTRY.values()})

__all__ = ["REGISTRY", "Method", "Methods", "from_dict", *sorted(cls.__name__ for cls in REGISTRY.values())]
