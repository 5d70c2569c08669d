"""Low-rank adaptation: y = W x + b + (alpha / r) B A drop(x)   (Hu et al. 2022, eq. 3).

A (rank, in) starts random, B (out, rank) starts at zero, so the adapted model starts as the base model. With one B for
all heads it is (head width, rank); with a pair for every head A is (heads * rank, in), one head's behind another's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.literal.masters import master_copy_of


class LowRank(nn.Module):
    """The term (alpha / r) B A drop(x) of one projection."""

    def __init__(self, inputs: int, outputs: int, method: Any, like: Tensor, heads: int) -> None:
        super().__init__()
        like = master_copy_of(like)
        self.form, self.heads = method.heads, heads
        self.A = nn.Parameter(like.new_empty(method.rank * (heads if self.form == "each" else 1), inputs))
        self.B = nn.Parameter(like.new_zeros(outputs // heads if self.form == "shared" else outputs, method.rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        alpha = method.rank if method.alpha is None else method.alpha
        self.scale = alpha / method.rank
        self.dropout = method.dropout

    def forward(self, x: Tensor, mask: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Return the term for rows x, with random dropout or with the given multipliers."""
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout) if mask is None else x * mask(x)
        h, b = x @ self.A.to(x.dtype).T, self.B.to(x.dtype)
        if self.form == "shared":
            return self.scale * torch.cat([h @ b.T] * self.heads, dim=-1)
        if self.form == "each":
            pairs = zip(h.chunk(self.heads, -1), b.chunk(self.heads), strict=True)
            return self.scale * torch.cat([part @ own.T for part, own in pairs], dim=-1)
        return self.scale * (h @ b.T)


def project(
    linear: nn.Linear,
    x: Tensor,
    role: str,
    lora: nn.ModuleDict | None,
    mask: Callable[[str, Tensor], Tensor] | None = None,
) -> Tensor:
    """Compute W x + b, and add the low-rank term of the role if there is one."""
    return with_term(linear(x), x, role, lora, mask)


def with_term(
    y: Tensor,
    x: Tensor,
    role: str,
    lora: nn.ModuleDict | None,
    mask: Callable[[str, Tensor], Tensor] | None = None,
) -> Tensor:
    """Add the low-rank term of a role on x, if there is one, to y."""
    if lora is None or role not in lora:
        return y
    return y + lora[role](x, None if mask is None else partial(mask, role))


def add(model: nn.Module, method: Any) -> None:
    """Give every block its low-rank terms as `blocks.i.lora.<role>.A` and `.B`."""
    for block in model.blocks:
        qkv = block.attn.qkv
        linears = {"qkv": qkv, "o": block.attn.proj, "fc1": getattr(block.mlp, "fc1", None), "fc2": block.mlp.fc2}
        shapes = dict.fromkeys("qkv", (qkv.in_features, qkv.out_features // 3))
        shapes |= {role: (linear.in_features, linear.out_features) for role, linear in linears.items() if linear}
        heads = block.attn.num_heads
        block.lora = nn.ModuleDict({role: LowRank(*shapes[role], method, qkv.weight, heads) for role in method.targets})
