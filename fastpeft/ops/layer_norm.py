"""LayerNorm, with the residual sum before it.

s = x + gamma * branch,   y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.ops import registered
from fastpeft.ops.autocast import suspended, without_autocast
from fastpeft.ops.choose import choose, is_reference


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str = "auto") -> Tensor:
    """LayerNorm over the last dimension.

    Args:
        x: (..., d).
        weight: (d,) or None.
        bias: (d,) or None.
        eps: added to the variance.
        backend: "auto" or one of `fastpeft.ops.choose.BACKENDS`.

    Returns:
        (..., d), of x's dtype.
    """
    return add_layer_norm(x, None, None, weight, bias, eps, backend)[1]


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The residual sum and its LayerNorm.

    Args:
        x: (..., d).
        branch: like x, or None.
        gamma: LayerScale of the branch, (d,), frozen; or None.
        weight: (d,) or None.
        bias: (d,) or None.
        eps: added to the variance.
        backend: "auto" or one of `fastpeft.ops.choose.BACKENDS`.

    Returns:
        The sum (x itself without a branch) and its LayerNorm, (..., d) each.

    Raises:
        BackendError: the backend asked for cannot run.
    """
    if not is_reference("layer_norm", backend, x.device):
        if branch is not None and branch.dtype != x.dtype:
            # As torch adds a product under autocast to an fp32 residual stream.
            dtype = torch.promote_types(x.dtype, branch.dtype)
            x, branch = x.to(dtype), branch.to(dtype)
        if torch.compiler.is_compiling():
            return registered.add_layer_norm(x, branch, gamma, weight, bias, eps, backend)
        options = {"branch": branch, "gamma": gamma}
        module = choose("layer_norm", backend, x.device, lambda module: module.reasons(x, weight, bias, eps, **options))
        if module is not None:
            with suspended(x.device):
                s, y = _AddLayerNorm.apply(x, branch, gamma, weight, bias, eps, module)
            return (x if branch is None else s), y
    return reference(x, branch, gamma, weight, bias, eps)


def reference(
    x: Tensor, branch: Tensor | None, gamma: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The equation in plain PyTorch. Arguments as of `add_layer_norm`."""
    if branch is not None:
        x = x + (branch if gamma is None else branch * gamma)
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    return x, F.layer_norm(x, x.shape[-1:], weight, bias, eps)


class _AddLayerNorm(torch.autograd.Function):
    """Keeps the sum and two numbers a row. Without a branch its first output is not to be used."""

    @staticmethod
    def forward(ctx, x, branch, gamma, weight, bias, eps: float, module: ModuleType):
        y, s, mean, rstd = module.forward(x, weight, bias, eps, branch=branch, gamma=gamma)
        ctx.save_for_backward(s, gamma, weight, mean, rstd)
        ctx.module, ctx.alone = module, branch is None
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        if branch is None:
            # An input cannot be an output that autograd is to follow; the caller has it already.
            s = x.new_empty(0)
            ctx.mark_non_differentiable(s)
        return s, y

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx, ds: Tensor | None, dy: Tensor | None):
        s, gamma, weight, mean, rstd = ctx.saved_tensors
        needs_x, needs_branch, _, needs_weight, needs_bias = ctx.needs_input_grad[:5]
        if ctx.alone:
            ds = None
        if dy is None:
            dbranch = ds if gamma is None or ds is None else ds * gamma
            return ds, dbranch if needs_branch else None, None, None, None, None, None
        dx, dbranch, dbias, dweight = ctx.module.backward(
            dy,
            s,
            weight,
            mean,
            rstd,
            ds=ds,
            gamma=gamma,
            needs_x=needs_x,
            needs_branch=needs_branch,
            needs_bias=needs_bias,
            needs_weight=needs_weight,
            bias_dtype=ctx.bias_dtype,
        )
        return dx, dbranch, None, dweight, dbias, None, None
