"""A multi-layer head on frozen features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fastpeft.engine.view import ModelView
from fastpeft.methods.base import Method, check, is_count, is_probability


@dataclass(frozen=True)
class MLPHead(Method):
    """k-1 hidden layers before the head's output layer (MLP-k of the VPT paper).

        hidden(x) = Dropout(BatchNorm(ReLU(W x + b))),   W of shape (d, d), Kaiming-normal (fan-out)

    The hidden layers are `head.mlp.*`; the output layer stays `head.weight`, `head.bias`.

    Attributes:
        k: number of layers, the output layer counted.
        dropout: behind every hidden layer.
    """

    name: ClassVar[str] = "mlp_head"
    k: int = 3
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check(is_count(self.k, 2), f"MLPHead: k must be an integer of at least 2, got {self.k!r}")
        check(is_probability(self.dropout), f"MLPHead: dropout must be in [0, 1), got {self.dropout!r}")

    def attach(self, model: ModelView) -> None:
        others = [type(head).__name__ for head in model.outputs() if any(True for _ in head.parameters())]
        check(bool(others), "MLPHead: the model has no head; create it with num_classes > 0")
        check(len(model.heads()) == len(others), f"MLPHead: the head must be an nn.Linear, got {', '.join(others)}")
        for head in model.heads():
            layers: list[nn.Module] = []
            for _ in range(self.k - 1):
                linear = nn.Linear(head.in_features, head.in_features)
                nn.init.kaiming_normal_(linear.weight, mode="fan_out")
                nn.init.zeros_(linear.bias)
                layers += [linear, nn.ReLU(), nn.BatchNorm1d(head.in_features), nn.Dropout(self.dropout)]
            model.deepen(head, nn.Sequential(*layers))
