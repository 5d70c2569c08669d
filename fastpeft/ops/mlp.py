"""The frozen two-layer MLP of a block.

    z = x W1^T + b1,   y = act(z) W2^T + b2
    dz = (dy W2) * act'(z),   dx = dz W1

Only z, or something smaller that the derivative follows from, is kept for the backward pass.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.ops import registered
from fastpeft.ops.activation import DERIVATIVES, FUNCTIONS
from fastpeft.ops.autocast import suspended, without_autocast, working
from fastpeft.ops.choose import choose, is_reference

# What the backward pass keeps: z in full, act'(z) in eight bits, or x.
KEEPS = ("preactivation", "derivative8", "nothing")


def mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    keep: str = "preactivation",
    backend: str = "auto",
) -> Tensor:
    """Apply the MLP; differentiable in x alone where an implementation runs it, in everything by the reference.

    Args:
        x: (..., d).
        weight1: (hidden, d).
        bias1: (hidden,) or None.
        weight2: (out, hidden).
        bias2: (out,) or None.
        activation: a name of `fastpeft.ops.activation.FUNCTIONS`.
        keep: one of `KEEPS`.
        backend: "auto" or one of `fastpeft.ops.choose.BACKENDS`.

    Returns:
        (..., out).

    Raises:
        BackendError: the backend asked for cannot run.
    """
    if not is_reference("mlp", backend, x.device) or keep != "preactivation":
        x, *weights = working(x, weight1, bias1, weight2, bias2)
        if torch.compiler.is_compiling():
            return registered.mlp(x, *weights, activation, keep, backend)
        rows = x.flatten(0, -2)
        module = choose("mlp", backend, x.device, lambda module: reasons(module, rows, *weights, activation, keep))
        if module is None and keep != "preactivation":
            module = _PLAIN
        if module is not None:
            with suspended(x.device):
                y = _Mlp.apply(rows, *weights, activation, keep, module)
            return y.view(*x.shape[:-1], y.shape[1])
    return reference(x, weight1, bias1, weight2, bias2, activation)


def reference(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None, activation: str
) -> Tensor:
    """The equation in plain PyTorch. Arguments as of `mlp`."""
    return F.linear(FUNCTIONS[activation](F.linear(x, weight1, bias1)), weight2, bias2)


# Of act' for every activation, with a little room: the code c stands for low + c * step. GELU's derivative, which spans
# the most, lies in [-0.1289, 1.1289], SiLU's and quick GELU's in [-0.1, 1.1].
DERIVATIVE_LOW, DERIVATIVE_STEP = -0.135, 1.27 / 255


def hidden(
    x: Tensor, weight1: Tensor, bias1: Tensor | None, activation: str, keep: str
) -> tuple[Tensor, Tensor | None]:
    """act(z), and what is kept of z."""
    z = F.linear(x, weight1, bias1)
    a = FUNCTIONS[activation](z)
    if keep == "preactivation":
        return a, z
    if keep == "nothing":
        return a, None
    code = (DERIVATIVES[activation](z).float() - DERIVATIVE_LOW) / DERIVATIVE_STEP
    return a, code.round().clamp(0, 255).to(torch.uint8)


def hidden_gradient(dy: Tensor, weight2: Tensor, kept: Tensor, activation: str, keep: str) -> Tensor:
    """dz from what `hidden` kept."""
    if keep == "derivative8":
        return (dy @ weight2) * (kept.float() * DERIVATIVE_STEP + DERIVATIVE_LOW).to(dy.dtype)
    return (dy @ weight2) * DERIVATIVES[activation](kept)


def reasons(module: ModuleType, x, weight1, bias1, weight2, bias2, activation: str, keep: str) -> list[str]:
    """Why an implementation cannot serve."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (weight1, bias1, weight2, bias2)):
        return ["a weight or bias of the MLP is trained"]
    return module.reasons(x, weight1, bias1, activation, keep=keep)


class _Plain:
    """The plain functions of this file in the place of an implementation."""

    forward = staticmethod(hidden)
    backward_input = staticmethod(hidden_gradient)


_PLAIN = _Plain()


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2, activation: str, keep: str, module: ModuleType):
        needed = ctx.needs_input_grad[0]
        a, kept = module.forward(x, weight1, bias1, activation, keep=keep if needed else "nothing")
        # What is kept is a Parameter itself or made here: a view of a weight would keep it where it is gathered.
        ctx.save_for_backward(*((x, bias1) if keep == "nothing" else (kept, None)), weight1, weight2)
        ctx.activation, ctx.keep, ctx.module = activation, keep, module
        return F.linear(a, weight2, bias2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx, dy: Tensor):
        kept, bias1, weight1, weight2 = ctx.saved_tensors
        keep = ctx.keep
        if keep == "nothing":
            kept, keep = F.linear(kept, weight1, bias1), "preactivation"
        dz = ctx.module.backward_input(dy, weight2, kept, ctx.activation, keep=keep)
        return dz @ weight1, None, None, None, None, None, None, None
