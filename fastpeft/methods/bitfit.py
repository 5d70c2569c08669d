"""BitFit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastpeft.engine.view import ModelView
from fastpeft.methods.base import Method, check


@dataclass(frozen=True)
class BitFit(Method):
    """Train every bias of the backbone: projections, FFN, LayerNorms, patch embedding ("bias" in the VPT paper)."""

    name: ClassVar[str] = "bitfit"

    def attach(self, model: ModelView) -> None:
        biases = [p for name, p in model.backbone() if "bias" in name.rsplit(".", 1)[-1]]
        check(bool(biases), "BitFit: the backbone has no bias")
        for parameter in biases:
            parameter.requires_grad_(True)
