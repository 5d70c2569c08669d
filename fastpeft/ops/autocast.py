"""Autocast for operators that are not torch's own: the format that torch's products get, and no second cast inside."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def working(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in the format that autocast would give a matrix product of them; as they are without autocast."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(None if t is None else t.to(dtype) if t.is_floating_point() else t for t in tensors)


def suspended(device: torch.device) -> AbstractContextManager:
    """No autocast inside; free where there is none."""
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def without_autocast(backward: Callable) -> Callable:
    """A backward pass that computes in its tensors' own formats, wherever it is called."""

    @functools.wraps(backward)
    def run(ctx, *gradients):
        device = next(g.device for g in gradients if g is not None)
        with suspended(device):
            return backward(ctx, *gradients)

    return run
