"""Linear probing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastpeft.engine.view import ModelView
from fastpeft.methods.base import Method


@dataclass(frozen=True)
class Linear(Method):
    """Train the head on frozen features."""

    name: ClassVar[str] = "linear"

    def attach(self, model: ModelView) -> None:
        """Nothing but the head is trained, and the head is the caller's."""
