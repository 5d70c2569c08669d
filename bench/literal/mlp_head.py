"""MLP-k: k-1 hidden layers of the backbone's width (Linear, ReLU, BatchNorm, dropout) before the output layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bench.literal.masters import master_copy_of


class MLPHead(nn.Module):
    """Hidden layers `mlp`, then the model's own output layer, whose `weight` and `bias` keep their names."""

    def __init__(self, output: nn.Linear, hidden_layers: int, dropout: float) -> None:
        super().__init__()
        width = output.in_features
        like = master_copy_of(output.weight)
        options = {"dtype": like.dtype, "device": like.device}
        layers: list[nn.Module] = []
        for _ in range(hidden_layers):
            linear = nn.Linear(width, width, **options)
            nn.init.kaiming_normal_(linear.weight, a=0, mode="fan_out")
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.ReLU(), nn.BatchNorm1d(width, **options), nn.Dropout(dropout)]
        self.mlp = nn.Sequential(*layers)
        self.weight, self.bias = output.weight, output.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of pooled features x, (batch, width)."""
        hidden = self.mlp(x.to(self.mlp[0].weight.dtype)) if len(self.mlp) else x
        return nn.functional.linear(hidden.to(x.dtype), self.weight, self.bias)


def add(model: nn.Module, method: Any) -> None:
    """Put the hidden layers before every output layer the model has (two on a distilled DeiT)."""
    for name in ("head", "head_dist"):
        if isinstance(getattr(model, name, None), nn.Linear):
            setattr(model, name, MLPHead(getattr(model, name), method.k - 1, method.dropout))
