"""Model families: how the transformers of a library map onto the engine's description.

Every module of this package is one family and defines `FAMILY`, a `Family`. Adding a file adds a family.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from abc import ABC, abstractmethod

from torch import nn

from fastpeft.engine.adopt import Adopted
from fastpeft.engine.description import HostSpec
from fastpeft.errors import UnsupportedModelError


class Family(ABC):
    """Recognises one kind of transformer and describes it.

    Attributes:
        requires: the library's module that a model of this family cannot exist without; nothing is imported before
            somebody else has imported it.
        host: mixin for the transformer, with its forward functions.
        block: mixin for its blocks.
        nested: children that may hold transformers of other families.
    """

    requires: str
    host: type[Adopted]
    block: type[Adopted]
    nested: tuple[str, ...] = ()

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether the module is a transformer of this family, or a variant that `describe` can name."""

    @abstractmethod
    def describe(self, module: nn.Module) -> HostSpec:
        """Describe a transformer.

        Raises:
            UnsupportedModelError: naming what the engine cannot run as a whole. Blocks that it cannot run are listed in
                `left_alone` instead, and are missing from `blocks`.
        """


def families() -> list[Family]:
    """All families whose library is loaded."""
    found = []
    for info in pkgutil.iter_modules(__path__):
        family = importlib.import_module(f"{__name__}.{info.name}").FAMILY
        if family.requires in sys.modules:
            found.append(family)
    return found


def find_hosts(model: nn.Module) -> list[tuple[str, nn.Module, Family]]:
    """Transformers inside a model, outermost first: (path, module, family).

    What a family speaks for itself is not looked into."""
    known = families()
    found: list[tuple[str, nn.Module, Family]] = []
    for path, module in model.named_modules():
        if any(_claims(outer, family, path) for outer, _, family in found):
            continue
        for family in known:
            if family.matches(module):
                found.append((path, module, family))
                break
    return found


def _claims(outer: str, family: Family, path: str) -> bool:
    """Whether a host's family speaks for the module of this path."""
    prefix = f"{outer}." if outer else ""
    if path == outer or not path.startswith(prefix):
        return path == outer
    return path.removeprefix(prefix).split(".")[0] not in family.nested


__all__ = ["Family", "UnsupportedModelError", "families", "find_hosts"]
