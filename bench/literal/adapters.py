"""Bottleneck adapters as modules of their own.

VPT's baseline   y = h + (u + Up(GELU(Down(u)))),  u = FFN(LN(h))    (one a block, biases)
serial           f = A(f),       A(x) = ReLU(x W_down) W_up + x       (after a sub-layer, before its residual)
parallel         f = f + s A(h), A(x) = ReLU(x W_down) W_up [+ x]     (beside a sub-layer, on its input)
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bench.literal.masters import master_copy_of


class Adapter(nn.Module):
    """Up(GELU(Down(u))); the sum with u is the block's."""

    def __init__(self, width: int, hidden: int, init: str, like: Tensor) -> None:
        super().__init__()
        like = master_copy_of(like)
        self.down = nn.Linear(width, hidden, dtype=like.dtype, device=like.device)
        self.up = nn.Linear(hidden, width, dtype=like.dtype, device=like.device)
        for zero in (self.down, self.up) if init == "released" else (self.up,):
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def forward(self, u: Tensor) -> Tensor:
        """Return the adapter's contribution for rows u."""
        return _cast_linear(self.up, F.gelu(_cast_linear(self.down, u)))


class Bottleneck(nn.Module):
    """scale * ReLU(x W_down) W_up, plus x where the equation has the skip."""

    def __init__(self, width: int, hidden: int, bias: bool, skip: bool, scale: float, like: Tensor) -> None:
        super().__init__()
        like = master_copy_of(like)
        self.down = nn.Linear(width, hidden, bias=bias, dtype=like.dtype, device=like.device)
        self.up = nn.Linear(hidden, width, bias=bias, dtype=like.dtype, device=like.device)
        nn.init.zeros_(self.up.weight)
        if bias:
            nn.init.zeros_(self.up.bias)
        self.skip = skip
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Return A(x)."""
        y = self.scale * _cast_linear(self.up, F.relu(_cast_linear(self.down, x)))
        return y + x if self.skip else y


def _cast_linear(linear: nn.Linear, x: Tensor) -> Tensor:
    """Apply a small fp32 layer to activations of the model's type: the factors are cast, not the activations."""
    bias = None if linear.bias is None else linear.bias.to(x.dtype)
    return F.linear(x, linear.weight.to(x.dtype), bias)


def add_adapter(model: nn.Module, method: Any) -> None:
    """Give every block `blocks.i.adapter.{down,up}`."""
    width = model.embed_dim
    for block in model.blocks:
        block.adapter = Adapter(width, width // method.reduction, method.init, block.attn.qkv.weight)


def add_serial(model: nn.Module, method: Any) -> None:
    """Give every block `blocks.i.serial_adapter.{attn,ffn}.{down,up}`."""
    for block in model.blocks:
        options = {"bias": method.bias, "skip": True, "scale": 1.0, "like": block.attn.qkv.weight}
        block.serial_adapter = nn.ModuleDict(
            {place: Bottleneck(model.embed_dim, method.hidden, **options) for place in method.locations}
        )


def add_parallel(model: nn.Module, method: Any) -> None:
    """Give every block `blocks.i.parallel_adapter.{attn,ffn}.{down,up}`."""
    for block in model.blocks:
        options = {"bias": method.bias, "skip": method.skip, "scale": method.scale, "like": block.attn.qkv.weight}
        block.parallel_adapter = nn.ModuleDict(
            {place: Bottleneck(model.embed_dim, method.hidden, **options) for place in method.locations}
        )
