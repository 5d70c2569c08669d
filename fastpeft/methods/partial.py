"""Partial fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastpeft.engine.view import ModelView
from fastpeft.methods.base import Method, check, is_count


@dataclass(frozen=True)
class Partial(Method):
    """Train the last k blocks and the final norm (Partial-k of the VPT paper).

    Attributes:
        k: number of blocks.
    """

    name: ClassVar[str] = "partial"
    k: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check(is_count(self.k), f"Partial: k must be a positive integer, got {self.k!r}")

    def attach(self, model: ModelView) -> None:
        check(self.k <= len(model.blocks), f"Partial: k={self.k}, but the model has {len(model.blocks)} blocks")
        for module in [block.module for block in model.blocks[-self.k :]] + model.final():
            module.requires_grad_(True)
