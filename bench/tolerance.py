"""Is a result right: its error against float64 beside that of plain PyTorch in the same format.

A tensor passes if its relative error is at most twice the plain one's plus one rounding, and below an absolute cap, so
that a bad baseline excuses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Of one operator: relative error that no baseline can excuse.
CAP = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Deviation:
    """How far one tensor, and its plain counterpart in the same format, are from the float64 reference.

    Attributes:
        name: of the tensor.
        error, baseline: relative errors, ||x - exact|| / ||exact||.
        bound: what `error` may be at most.
        worst: index of the largest absolute error, with the value and the exact one there.
    """

    name: str
    error: float
    baseline: float
    bound: float
    worst: str

    @property
    def passed(self) -> bool:
        """Whether the result is close enough; never true of a NaN."""
        return self.error <= self.bound

    def __str__(self) -> str:
        return (
            f"{self.name}: relative error {self.error:.2e}, bound {self.bound:.2e} (plain {self.baseline:.2e}); "
            f"worst at {self.worst}"
        )


def relative_error(value: Tensor, exact: Tensor, size: float | None = None) -> float:
    """Relative error in the Frobenius norm; infinite where a value is not finite.

    Args:
        value: any format.
        exact: of the same shape.
        size: what the error is relative to; the norm of `exact` by default.

    Raises:
        AssertionError: the shapes differ.
    """
    assert value.shape == exact.shape, f"shape {tuple(value.shape)}, expected {tuple(exact.shape)}"
    exact = exact.double()
    value = value.to(exact.device, torch.float64)
    if not value.isfinite().all():
        return float("inf")
    return float((value - exact).norm()) / max(float(exact.norm()) if size is None else size, 1e-30)


def bound(baseline: float, dtype: torch.dtype, cap: float | None = None) -> float:
    """What the error may be, given that of plain PyTorch in the same format; `cap` is the operators' by default."""
    return min(2 * baseline + torch.finfo(dtype).eps, CAP[dtype] if cap is None else cap)


def worst_place(value: Tensor, exact: Tensor) -> str:
    """Index of the largest absolute error, with both values; nothing of an empty tensor."""
    if not exact.numel():
        return ""
    exact = exact.double()
    value = value.to(exact.device, torch.float64)
    flat = int((value - exact).abs().nan_to_num(torch.inf).argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), exact.shape))
    return f"{index}: {float(value.flatten()[flat]):.6g} against {float(exact.flatten()[flat]):.6g}"
