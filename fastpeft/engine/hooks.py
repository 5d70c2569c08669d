"""Finding hooks, and running code under them.

The engine skips containers and rows that nobody reads. Somebody who hooked a module reads them, so a hooked block runs
every row through every module, containers included.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torch.nn.modules import module as _module


def has_hooks(module: nn.Module) -> bool:
    """Whether the module itself carries a forward or backward hook of any kind."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def any_hooks(module: nn.Module) -> bool:
    """Whether any module below this one (or every module, globally) carries a hook.

    The module's own hooks do not count: they run around its `forward` whatever that does inside.
    """
    return _module._has_any_global_hook() or any(_hooked(child) for child in module._modules.values() if child)


def _hooked(module: nn.Module) -> bool:
    return has_hooks(module) or any(_hooked(child) for child in module._modules.values() if child is not None)


def draws(module: nn.Module) -> bool:
    """Whether a torch dropout below this module is active, whose mask depends on the shape that it is given."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.training and module.p > 0
    return any(draws(child) for child in module._modules.values() if child is not None)


class _Standin(nn.Module):
    """Looks like another module, hooks included, and runs a function of ours as its forward."""

    def __init__(self, module: nn.Module, function: Callable):
        # Not `super().__init__()`: every attribute, the dictionaries of hooks too, is the other module's own.
        self.__dict__ = {**module.__dict__, "_function": function}

    def forward(self, *args):
        return self.__dict__["_function"](*args)


def call_under_hooks(module: nn.Module, function: Callable, *args):
    """Run `function(*args)` as if it were the module's forward, hooks and all."""
    return _Standin(module, function)(*args) if has_hooks(module) else function(*args)
