"""Prefix tuning in its two forms.

keys and values   softmax(q [P_k; k]^T / sqrt(head width)) [P_v; v]      (Li & Liang 2021)
hidden states     [_, x_i] = L_i([P_i, x_{i-1}])                         (tokens before every block's input)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bench.literal.masters import master_copy_of


class Prefix(nn.Module):
    """The prefix of one block: free tensors or, for keys and values, [P_k, P_v] = W_2 tanh(W_1 E + b_1) + b_2."""

    def __init__(self, method: Any, width: int, like: Tensor) -> None:
        super().__init__()
        like = master_copy_of(like)
        self.form = method.form
        self.reparametrised = method.mlp is not None

        def rows() -> nn.Parameter:
            return nn.Parameter(like.new_empty(method.length, width).normal_(std=0.02))

        if self.reparametrised:
            options = {"dtype": like.dtype, "device": like.device}
            self.embedding = rows()
            self.mlp = nn.Sequential(
                nn.Linear(width, method.mlp, **options), nn.Tanh(), nn.Linear(method.mlp, 2 * width, **options)
            )
        elif self.form == "kv":
            self.k, self.v = rows(), rows()
        else:
            self.prompts = rows()

    def keys_and_values(self) -> tuple[Tensor, Tensor] | None:
        """Return the learned keys and values, (length, heads * head width) each; None in the other form."""
        if self.form != "kv":
            return None
        return self.mlp(self.embedding).chunk(2, dim=-1) if self.reparametrised else (self.k, self.v)

    def hidden_rows(self, batch: int) -> Tensor | None:
        """Return the rows to insert before the block, (batch, length, width); None in the other form."""
        return self.prompts.expand(batch, -1, -1) if self.form == "hidden" else None


def add(model: nn.Module, method: Any) -> None:
    """Give every block its prefix as `blocks.i.prefix.*`."""
    for block in model.blocks:
        block.prefix = Prefix(method, model.embed_dim, block.attn.qkv.weight)
