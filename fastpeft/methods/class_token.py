"""Tuning the embedding of the class token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastpeft.engine.view import ModelView
from fastpeft.methods.base import Method, check


@dataclass(frozen=True)
class ClassToken(Method):
    """Train the embeddings of the tokens that the head reads ("CLS-learned" in Fig. 11 of the VPT paper)."""

    name: ClassVar[str] = "class_token"

    def attach(self, model: ModelView) -> None:
        tokens = model.read_tokens()
        check(bool(tokens), "ClassToken: the head of this model reads no learned token")
        for token in tokens:
            token.requires_grad_(True)
