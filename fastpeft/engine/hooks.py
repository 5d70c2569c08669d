"""Finding hooks, and running code under them.

The engine skips containers and rows that nobody reads. Somebody who hooked a module reads them, so a hooked block runs
every row through every module, containers included.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from torch import nn
from torch.nn.modules import module as _module

from fastpeft.errors import UnsupportedModelError

_borrowing = threading.RLock()


def replaced(module: nn.Module) -> bool:
    """Whether the instance has a forward of somebody's own, as accelerate's hooks put there.

    The class's own forward, bound to the module, does not count: accelerate leaves it behind when a hook is removed.
    """
    own = module.__dict__.get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def has_hooks(module: nn.Module) -> bool:
    """Whether the module itself carries a forward or backward hook of any kind, or a replaced forward."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    return replaced(module)


def watched(*modules: nn.Module) -> bool:
    """Whether somebody sees what one of these modules is given or gives: by a hook of its own, or of every module."""
    return _module._has_any_global_hook() or any(has_hooks(module) for module in modules)


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


def call_under_hooks(module: nn.Module, function: Callable, *args):
    """Run `function(*args)` as if it were the module's forward, hooks and all.

    Raises:
        UnsupportedModelError: the module has a forward of its own, which knows nothing of what a method adds.
    """
    if not has_hooks(module):
        return function(*args)
    if replaced(module):
        raise UnsupportedModelError(
            f"the forward of a block's {type(module).__name__} was replaced on the instance (accelerate's hooks do "
            "that), and the method's tensors could not enter it; hook its linear layers or the block around it instead"
        )
    # Hooks are given the module and may keep something on it, so it must be the module itself that is called.
    with _borrowing:
        module.forward = function
        try:
            return module(*args)
        finally:
            del module.forward
