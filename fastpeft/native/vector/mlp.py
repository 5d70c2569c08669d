"""The first layer of a frozen MLP with its activation, on any CPU. See csrc/cpu/vector/mlp.cpp.

    z = x W1^T + b1,    a = act(z)          dz = (dy W2) * act'(z)

The products are torch's; what stands beside them is done in place, in one pass.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastpeft.native.memory import pool
from fastpeft.native.vector.library import call, in_fp32, parameter_reasons, pointer, type_reasons

# csrc/cpu/vector/activation.h counts them so.
ACTIVATIONS = ("identity", "relu", "gelu", "gelu_tanh", "quick_gelu", "silu")
KEEPS = ("nothing", "preactivation", "derivative8")


class _Mlp(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("values", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("kept", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("writes_hidden", "activation", "keep", "threads", "half")),
    ]


def _structure(values: Tensor, activation: str, **rest) -> _Mlp:
    rows, columns = values.shape
    return _Mlp(
        rows=rows, columns=columns, values=values.data_ptr(), activation=ACTIVATIONS.index(activation),
        threads=torch.get_num_threads(), half=values.dtype == torch.bfloat16, **rest,
    )  # fmt: skip


def activate_(z: Tensor, bias: Tensor | None, activation: str, kept: Tensor | None = None) -> Tensor:
    """Turn z into act(z + bias).

    Args:
        z: (rows, columns), fp32 or bf16, contiguous; overwritten.
        bias: fp32 (columns,) or None.
        activation: one of `ACTIVATIONS`.
        kept: like z for z + bias, or uint8 for the derivative's codes, to be written; or None.

    Returns:
        z.
    """
    keep = 0 if kept is None else 2 if kept.dtype == torch.uint8 else 1
    call("mlp_forward", _structure(z, activation, bias=pointer(bias), kept=pointer(kept), keep=keep))
    return z


def differentiate_(
    gradient: Tensor,
    kept: Tensor,
    activation: str,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    hidden: bool = False,
) -> Tensor:
    """Turn the gradient of act(z) into that of z.

    Args:
        gradient: (rows, columns), fp32 or bf16, contiguous; overwritten.
        kept: as `activate_` wrote it.
        activation: one of `ACTIVATIONS`.
        bias: fp32 (columns,), still to be added to what was kept, or None.
        scale: factor of the gradient; with kept numbers, not codes.
        hidden: leave act(z) in `kept`.

    Returns:
        gradient.
    """
    arguments = _structure(
        gradient, activation, bias=pointer(bias), kept=kept.data_ptr(), scale=scale, writes_hidden=hidden,
        keep=2 if kept.dtype == torch.uint8 else 1,
    )  # fmt: skip
    call("mlp_backward", arguments)
    return gradient


def reasons(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, *, keep: str = "preactivation"
) -> list[str]:
    """Why `forward` and `backward_input` cannot serve these arguments of `forward`; empty if they can."""
    found = type_reasons(x)
    if activation not in ACTIVATIONS:
        found.append(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if keep not in KEEPS:
        found.append(f"keep={keep!r} is not one of {', '.join(KEEPS)}")
    if keep == "derivative8" and x.dtype == torch.float32:
        found.append("8 bits of a derivative are too few for float32")
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        return [*found, f"x {tuple(x.shape)} and weight {tuple(weight.shape)} are not (M, K) and (N, K)"]
    if weight.dtype != x.dtype:
        found.append(f"the weight is {weight.dtype}, the input {x.dtype}")
    return found + parameter_reasons("the bias", bias, weight.shape[:1], x)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, *, keep: str = "preactivation"
) -> tuple[Tensor, Tensor | None]:
    """The first layer and the activation.

    Args:
        x: (M, K).
        weight: (N, K) in x's dtype.
        bias: (N,), in x's dtype or fp32, or None.
        activation: one of `ACTIVATIONS`.
        keep: what `backward_input` will be given: "preactivation", "derivative8" (not for fp32) or "nothing".

    Returns:
        a (M, N) in x's dtype, and what is kept, (M, N): z in x's dtype, uint8, or None.
    """
    a = pool.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    # A bias of the product's own type is added by the product; with `out`, neither autocast nor autograd touches it.
    if bias is not None and bias.dtype == x.dtype:
        torch.addmm(bias, x, weight.t(), out=a)
        bias = None
    else:
        torch.mm(x, weight.t(), out=a)
    kept = None
    if keep != "nothing":
        kept = pool.empty(*a.shape, dtype=torch.uint8 if keep == "derivative8" else a.dtype)
    return activate_(a, in_fp32(bias), activation, kept), kept


def backward_input(dy: Tensor, weight2: Tensor, kept: Tensor, activation: str, *, keep: str) -> Tensor:
    """Gradient of the preactivation.

    Args:
        dy: (M, N), gradient of the second layer's output.
        weight2: (N, K) of the second layer, in dy's dtype.
        kept: (M, K) from `forward`; with keep="nothing", z in dy's dtype, which the caller has computed again.
        activation: as given to `forward`.
        keep: as given to `forward`.

    Returns:
        dz (M, K) in dy's dtype.
    """
    dz = pool.empty(dy.shape[0], weight2.shape[1], dtype=dy.dtype)
    torch.mm(dy, weight2, out=dz)
    return differentiate_(dz, kept.contiguous(), activation)
