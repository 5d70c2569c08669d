"""Visual prompt tuning (Jia et al. 2022).

    shallow  [x_1, Z_1, E_1] = L_1([x_0, P, E_0])                        (eqs. 4, 5)
             [x_i, Z_i, E_i] = L_i([x_{i-1}, Z_{i-1}, E_{i-1}])
    deep     [x_i, _,   E_i] = L_i([x_{i-1}, P_{i-1}, E_{i-1}])          (eq. 7)

Prompts entering blocks i..j only are replaced before each of them and carried on as Z after block j.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from bench.literal.masters import master_copy_of


class Prompts(nn.Module):
    """The prompts that enter one block: `prompts` of (length, width), or one row repeated `length` times."""

    def __init__(self, prompts: nn.Parameter, length: int, dropout: float, one_mask: bool) -> None:
        super().__init__()
        self.prompts = prompts
        self.length = length
        self.dropout = dropout
        self.one_mask = one_mask

    def forward(self, batch: int, mask: Callable[[int], Tensor] | None) -> Tensor:
        """Return the rows to insert, (batch, length, width), dropped out in training mode."""
        rows = self.prompts.expand(self.length, -1).expand(batch, -1, -1)
        if not (self.training and self.dropout):
            return rows
        if mask is not None:
            return rows * mask(batch)
        if self.one_mask:
            return F.dropout(rows[:1], self.dropout).expand(batch, -1, -1)
        return F.dropout(rows, self.dropout)


def add(model: nn.Module, method: Any) -> None:
    """Give the prompted blocks their prompts as `blocks.i.vpt.prompts`."""
    first, last = method.depth or ((1, len(model.blocks)) if method.deep else (1, 1))
    dropout = method.dropout if method.dropout is not None else (0.1 if method.deep and method.trained else 0.0)
    rows = 1 if method.share in ("intra", "all") else method.length
    everywhere = method.share in ("inter", "all")

    prompts = None
    for index in range(first - 1, last):
        if prompts is None or not everywhere:
            prompts = _new_prompts(model, rows)
        model.blocks[index].vpt = Prompts(prompts, method.length, dropout, method.dropout_mask == "batch")


def _new_prompts(model: nn.Module, rows: int) -> nn.Parameter:
    """Draw prompts uniformly from [-v, v], v = sqrt(6 / (3 * patch area + width))."""
    like = master_copy_of(model.blocks[0].attn.qkv.weight)
    height, width = model.patch_embed.patch_size
    bound = math.sqrt(6.0 / (3 * height * width + model.embed_dim))
    return nn.Parameter(like.new_empty(rows, model.embed_dim).uniform_(-bound, bound))
