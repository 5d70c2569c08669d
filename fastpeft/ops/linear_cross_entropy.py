"""Cross-entropy over a vocabulary whose logits nobody else looks at.

    z = x W^T + b,    L_r = -log softmax(z_r)[target_r]
    dz_r = dL_r (softmax(z_r) - onehot(target_r)),    dx = dz W

The gradient without dL takes the logits' place in the forward pass, in their precision: one tensor (R, V) stays, where
the composition keeps the logits and their logarithms in fp32.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.ops.autocast import suspended, without_autocast, working
from fastpeft.ops.choose import choose, is_reference

# The target that torch leaves out, which nobody has: -100 is as wrong as any other.
_NOBODY = -(1 << 62)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, backend: str = "auto"
) -> Tensor:
    """The loss of every row.

    Args:
        x: (R, d).
        weight: (V, d).
        bias: (V,) or None.
        targets: int64 (R,), each in [0, V).
        backend: "auto" or one of `fastpeft.ops.choose.BACKENDS`.

    Returns:
        fp32 (R,), or float64 for x in float64.

    Raises:
        BackendError: the backend asked for cannot run.
        IndexError: a target is not in [0, V). Nor is -100, torch's word for none: leave such rows out. On a GPU CUDA
            says so.
        ValueError: the targets are of another shape or dtype.
    """
    if targets.dtype != torch.int64 or targets.shape != x.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy needs an int64 target for each of {x.shape[0]} rows, got {targets.dtype} "
            f"{tuple(targets.shape)}"
        )
    if not is_reference("linear_cross_entropy", backend, x.device) and not torch.compiler.is_compiling():
        x, weight, bias = working(x, weight, bias)
        module = choose("linear_cross_entropy", backend, x.device, lambda module: module.reasons(x, weight))
        if module is not None and x.shape[0]:
            with suspended(x.device):
                return _LinearCrossEntropy.apply(x, weight, bias, targets, module)
    return reference(x, weight, bias, targets)


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """The equation in plain PyTorch. Arguments as of `linear_cross_entropy`."""
    logits = F.linear(x, weight, bias)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, targets, reduction="none", ignore_index=_NOBODY)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, module: ModuleType):
        needs = any(ctx.needs_input_grad[:3])
        losses, slopes = module.forward(x, weight, bias, targets, gradient=needs)
        # Rows are read again by the weight's gradient alone.
        ctx.save_for_backward(slopes, weight, x if ctx.needs_input_grad[1] else None)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx, dlosses: Tensor):
        slopes, weight, x = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        scale = dlosses[:, None]
        dx = ((slopes @ weight).float() * scale).to(slopes.dtype) if needs_x else None
        dweight = slopes.t() @ (x.float() * scale).to(x.dtype) if needs_weight else None
        dbias = (slopes.t() @ dlosses.to(slopes.dtype)) if needs_bias else None
        return dx, dweight, dbias, None, None
