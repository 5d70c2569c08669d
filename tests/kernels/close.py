"""Is a kernel's result right: its error against float64 beside that of plain PyTorch in the same precision."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative error that no baseline can excuse, and what a comparison of two rounded results may always differ by.
CAP = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def error(value: Tensor, exact: Tensor) -> float:
    """Relative error in the Frobenius norm; infinite where a value is not finite."""
    value, exact = value.double().cpu(), exact.double().cpu()
    assert value.shape == exact.shape, f"shape {tuple(value.shape)}, expected {tuple(exact.shape)}"
    if not value.isfinite().all():
        return float("inf")
    return float((value - exact).norm() / exact.norm().clamp_min(1e-30))


def assert_close(name: str, value: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The error is at most twice that of plain PyTorch plus one rounding, and below the cap.

    Args:
        name: of the result, for the message.
        value: the kernel's.
        plain: PyTorch's in the same precision.
        exact: PyTorch's in float64.
    """
    found, baseline = error(value, exact), error(plain, exact)
    bound = min(2 * baseline + torch.finfo(value.dtype).eps, CAP[value.dtype])
    if found <= bound:
        return
    difference = (value.double().cpu() - exact.double().cpu()).abs()
    worst = tuple(int(i) for i in torch.unravel_index(difference.nan_to_num(float("inf")).argmax(), difference.shape))
    raise AssertionError(
        f"{name}: relative error {found:.2e}, bound {bound:.2e} (plain {baseline:.2e}); worst at {worst}: "
        f"{value[worst].item():.6g}, exact {exact[worst].item():.6g}"
    )
