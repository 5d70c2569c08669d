"""What the engine runs a frozen block's branches by on CPUs with a matrix unit: the operator "block", backend "cpu"."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpeft import _native
from fastpeft.native.blocked import BLOCK
from fastpeft.native.bottleneck import Adapter
from fastpeft.native.branches import Attention, Mlp, attention_branch, mlp_branch
from fastpeft.native.gemm import DTYPES
from fastpeft.native.linear import Linear, bottleneck, linear
from fastpeft.native.low_rank import Place
from fastpeft.native.packs import Packs
from fastpeft.native.trained import Trained

__all__ = [
    "Adapter",
    "Attention",
    "Linear",
    "Mlp",
    "Packs",
    "Place",
    "Trained",
    "attention_branch",
    "bottleneck",
    "linear",
    "mlp_branch",
    "reasons",
]

# Heads begin within a block of 32 columns at a half of it at the earliest.
_HEAD_STEP = 16


def reasons(x: Tensor, widths: tuple[int, ...], head_dim: int | None, weights: Sequence[Tensor] = ()) -> list[str]:
    """Why a branch cannot run here; empty if it can.

    Args:
        x: (B, N, d), the branch's input.
        widths: of everything that is multiplied: inputs, hidden units, outputs.
        head_dim: of attention, or None.
        weights: of the layers, which are packed as they are.
    """
    found = [] if x.numel() else ["there are no rows"]
    if _native.cpu_level() != "amx":
        found.append(f"it needs a CPU with AMX, this one has {_native.cpu_level()}")
    # An fp32 residual stream is what autocast leaves: its products are in bf16.
    mixed = torch.is_autocast_enabled("cpu")
    if (x.dtype not in (torch.bfloat16, torch.float32)) if mixed else x.dtype != torch.bfloat16:
        found.append(f"it computes in bfloat16, the activations are {_name(x.dtype)}")
    if mixed and torch.get_autocast_dtype("cpu") != torch.bfloat16:
        found.append(f"it computes in bfloat16, autocast in {_name(torch.get_autocast_dtype('cpu'))}")
    others = {w.dtype for w in weights} - set(DTYPES)
    if others:
        found.append(f"weights must be bfloat16 or float32, some are {', '.join(sorted(map(_name, others)))}")
    if any(width % BLOCK for width in widths):
        found.append(f"widths must be multiples of {BLOCK}, they are {', '.join(map(str, widths))}")
    if head_dim is not None and head_dim % _HEAD_STEP:
        found.append(f"heads must be multiples of {_HEAD_STEP} wide, they are {head_dim}")
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
