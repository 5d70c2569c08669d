"""Is a kernel's result right: its error against float64 beside that of plain PyTorch in the same precision."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.tolerance import CAP, Deviation, bound, relative_error, worst_place

__all__ = ["CAP", "assert_close", "error"]


def error(value: Tensor, exact: Tensor) -> float:
    """Relative error in the Frobenius norm; infinite where a value is not finite."""
    return relative_error(value, exact)


def assert_close(name: str, value: Tensor, plain: Tensor, exact: Tensor, roundings: float = 1.0) -> None:
    """The error is at most twice that of plain PyTorch plus one rounding, and below the cap.

    Args:
        name: of the result, for the message.
        value: the kernel's.
        plain: PyTorch's in the same precision.
        exact: PyTorch's in float64.
        roundings: instead of one, for a reason that the caller gives.
    """
    found, baseline = error(value, exact), error(plain, exact)
    allowed = min(bound(baseline, value.dtype) + (roundings - 1) * torch.finfo(value.dtype).eps, CAP[value.dtype])
    if not found <= allowed:
        raise AssertionError(str(Deviation(name, found, baseline, allowed, worst_place(value, exact))))
