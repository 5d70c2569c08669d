"""The bottleneck adapter.

h = act(x W_down^T + b_down),   y = scale * (h W_up^T + b_up) + residual
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.ops import registered
from fastpeft.ops.activation import FUNCTIONS
from fastpeft.ops.autocast import suspended, without_autocast, working
from fastpeft.ops.choose import choose, is_reference


def adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    activation: str,
    scale: float = 1.0,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Apply an adapter.

    Args:
        x: (..., d).
        down_weight: (hidden, d); like the other factors in x's dtype or fp32 masters.
        down_bias: (hidden,) or None.
        up_weight: (d, hidden).
        up_bias: (d,) or None.
        activation: a name of `fastpeft.ops.activation.FUNCTIONS`.
        scale: factor of the up-projection.
        residual: added to the result, like x; x itself for an adapter with a skip connection.
        backend: "auto" or one of `fastpeft.ops.choose.BACKENDS`.

    Returns:
        (..., d), of x's dtype.

    Raises:
        BackendError: the backend asked for cannot run.
    """
    if not is_reference("adapter", backend, x.device):
        factors = (down_weight, down_bias, up_weight, up_bias)
        skip = residual is x
        x, residual = working(x, residual)
        if torch.compiler.is_compiling():
            return registered.adapter(x, *factors, activation, scale, residual, backend)
        rows = x.flatten(0, -2)
        beside = rows if skip else None if residual is None else residual.flatten(0, -2)
        module = choose(
            "adapter",
            backend,
            x.device,
            lambda module: module.reasons(rows, *factors, activation, scale, residual=beside),
        )
        if module is not None:
            with suspended(x.device):
                out = _Adapter.apply(rows, *factors, activation, scale, None if skip else beside, skip, module)
            return out.view(x.shape)
    return reference(x, down_weight, down_bias, up_weight, up_bias, activation, scale, residual)


def reference(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    activation: str,
    scale: float,
    residual: Tensor | None,
) -> Tensor:
    """The equation in plain PyTorch. Arguments as of `adapter`."""
    down_weight, down_bias, up_weight, up_bias = (
        None if t is None else t.to(x.dtype) for t in (down_weight, down_bias, up_weight, up_bias)
    )
    h = FUNCTIONS[activation](F.linear(x, down_weight, down_bias))
    y = F.linear(h, up_weight, up_bias)
    if scale != 1.0:
        y = y * scale
    return y if residual is None else residual + y


class _Adapter(torch.autograd.Function):
    """Keeps its input; the hidden units are computed again."""

    @staticmethod
    def forward(ctx, x, down_weight, down_bias, up_weight, up_bias, activation, scale, residual, skip, module):
        ctx.save_for_backward(x, down_weight, down_bias, up_weight, up_bias)
        ctx.settings = activation, scale, skip
        ctx.module: ModuleType = module
        beside = x if skip else residual
        return module.forward(x, down_weight, down_bias, up_weight, up_bias, activation, scale, residual=beside)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx, dy: Tensor):
        activation, scale, skip = ctx.settings
        gradients = ctx.module.backward(
            dy,
            *ctx.saved_tensors,
            activation,
            scale,
            skip=skip,
            needs_x=ctx.needs_input_grad[0],
            needs_weights=any(ctx.needs_input_grad[1:5]),
        )
        kept = [g if need else None for g, need in zip(gradients, ctx.needs_input_grad[:5], strict=True)]
        return (*kept, None, None, dy if ctx.needs_input_grad[7] else None, None, None)
