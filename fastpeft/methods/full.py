"""Full fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastpeft.engine.view import ModelView
from fastpeft.methods.base import Method


@dataclass(frozen=True)
class Full(Method):
    """Train every backbone parameter. With VPT in a sum this is the Mixed strategy of "VPT or full fine-tuning"."""

    name: ClassVar[str] = "full"
    backbone_dropout: ClassVar[bool] = True

    def attach(self, model: ModelView) -> None:
        for _, parameter in model.backbone():
            parameter.requires_grad_(True)
