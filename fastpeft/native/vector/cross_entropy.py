"""Cross-entropy in the place of its logits, on any CPU. See csrc/cpu/vector/cross_entropy.cpp."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastpeft.native.memory import pool
from fastpeft.native.vector.library import call, form, type_reasons


class _CrossEntropy(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("values", ctypes.c_void_p),
        ("targets", ctypes.c_void_p),
        ("losses", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("gradient", "threads", "half", "unused")),
    ]


def reasons(x: Tensor, weight: Tensor) -> list[str]:
    """Why `losses_` cannot serve the logits of rows x with a weight; empty if it can."""
    found = type_reasons(x)
    if weight.dtype != x.dtype:
        found.append(f"the weight is {form(weight)}, the rows are {form(x)}")
    return found


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """-log softmax(x W^T + b)[target], row by row.

    Args:
        x: (R, d), fp32 or bf16.
        weight: (V, d), of x's dtype.
        bias: (V,), likewise, or None.
        targets: int64 (R,), each in [0, V).
        gradient: softmax less one at the target is wanted.

    Returns:
        Losses, fp32 (R,); and (R, V) of x's dtype, or None.
    """
    logits = pool.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    if bias is None:
        torch.mm(x, weight.t(), out=logits)
    else:
        torch.addmm(bias.to(x.dtype), x, weight.t(), out=logits)
    losses = losses_(logits, targets, gradient)
    return losses, logits if gradient else None


def losses_(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """-log softmax(logits)[target], row by row.

    Args:
        logits: (R, V), fp32 or bf16, contiguous; if the gradient is wanted it takes their place.
        targets: int64 (R,), each in [0, V).
        gradient: softmax(logits) less one at the target is wanted.

    Returns:
        fp32 (R,).

    Raises:
        IndexError: a target is not in [0, V); the logits then hold anything.
    """
    found = torch.empty(logits.shape[0])
    targets = targets.contiguous()
    rows, columns = logits.shape
    structure = _CrossEntropy(
        rows=rows, columns=columns, values=logits.data_ptr(), targets=targets.data_ptr(), losses=found.data_ptr(),
        gradient=gradient, threads=torch.get_num_threads(), half=logits.dtype == torch.bfloat16,
    )  # fmt: skip
    try:
        call("cross_entropy", structure)
    except IndexError:
        wrong = targets[(targets < 0) | (targets >= columns)]
        # In the reference's words.
        raise IndexError(f"Target {int(wrong[0])} is out of bounds.") from None
    return found
