"""A linear head with layers before it."""

from __future__ import annotations

from torch import Tensor

from fastpeft.engine.adopt import Adopted


class DeepHead(Adopted):
    """Mixin of an adopted linear head: its child `mlp` holds the hidden layers, its own weight is the output layer."""

    def forward(self, x: Tensor) -> Tensor:
        # The hidden layers are fp32 masters on a model of lower precision, BatchNorm's statistics too.
        hidden = self.mlp(x.to(next(self.mlp.parameters()).dtype))
        return super().forward(hidden.to(x.dtype))
