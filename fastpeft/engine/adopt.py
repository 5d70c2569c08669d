"""Giving a module that lives in somebody's model a new behaviour, and taking it back.

The module stays the same object with the same children: references, hooks, optimizers and `state_dict()` keys are
untouched, and `isinstance` keeps its answers, because the new class derives from the old one.
"""

from __future__ import annotations

import copyreg
import functools

from torch import nn

from fastpeft.engine.hooks import replaced


class Adopted:
    """Mixin of every class that `adopt` puts in front of a module's own class."""

    def __reduce_ex__(self, protocol: int):
        # The class is made at run time, so pickle cannot find it by name: store what it was made of.
        return _rebuild, type(self).__bases__, super().__reduce_ex__(max(protocol, 2))[2]


def _rebuild(mixin: type, base: type) -> nn.Module:
    return copyreg.__newobj__(_combined(mixin, base))


@functools.cache
def _combined(mixin: type, base: type) -> type:
    return type(base.__name__, (mixin, base), {"__module__": base.__module__, "__qualname__": base.__qualname__})


def adopt(module: nn.Module, mixin: type[Adopted]) -> None:
    """Put `mixin` in front of the module's class, in place."""
    _uncover(module)
    module.__class__ = _combined(mixin, type(module))


def release(module: nn.Module) -> None:
    """Undo `adopt`."""
    if isinstance(module, Adopted):
        _uncover(module)
        module.__class__ = type(module).__bases__[1]


def _uncover(module: nn.Module) -> None:
    """Let the class decide about forward, where the instance holds nothing but the class's own, bound."""
    if "forward" in module.__dict__ and not replaced(module):
        del module.forward


def original_class(module: nn.Module) -> type:
    """The class that the module had before it was adopted."""
    return type(module).__bases__[1] if isinstance(module, Adopted) else type(module)
