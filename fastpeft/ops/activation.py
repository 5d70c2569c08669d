"""Activations by name: what a kernel can be told about a function."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), CLIP's approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": quick_gelu,
    "silu": F.silu,
}


def _gelu_tanh_slope(z: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(torch.ones_like(z), z, approximate="tanh")


def _quick_gelu_slope(z: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * z)
    return s * (1.0 + 1.702 * z * (1.0 - s))


# d act(z) / dz by the names of `FUNCTIONS`.
DERIVATIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": torch.ones_like,
    "relu": lambda z: (z > 0).to(z.dtype),
    "gelu": lambda z: torch.ops.aten.gelu_backward(torch.ones_like(z), z),
    "gelu_tanh": _gelu_tanh_slope,
    "quick_gelu": _quick_gelu_slope,
    "silu": lambda z: torch.ops.aten.silu_backward(torch.ones_like(z), z),
}


def name_of(act: object) -> str | None:
    """The name in `FUNCTIONS` of an activation, given as a function or as a module of torch; None if it has none."""
    if isinstance(act, nn.Module):
        # A class derived from one of these may do anything; only the very class is known.
        if type(act) is nn.GELU:
            return {"none": "gelu", "tanh": "gelu_tanh"}.get(act.approximate)
        return {nn.Identity: "identity", nn.ReLU: "relu", nn.SiLU: "silu"}.get(type(act))
    return next((name for name, function in FUNCTIONS.items() if function is act), None)
