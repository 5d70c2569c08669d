"""Tuning the output layer of a model that has no head of its own for the task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastpeft.engine.view import ModelView
from fastpeft.methods.base import Method, check


@dataclass(frozen=True)
class Classifier(Method):
    """Trains a language model's output layer, usually beside another method: `LoRA(8) + Classifier()`.

    Attributes:
        part: "head": all of it; with a vocabulary matrix that is tied to the word embeddings these move along.
            "transform": what stands before that matrix, and the vocabulary's bias.
    """

    name: ClassVar[str] = "classifier"
    part: str = "head"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(isinstance(self.part, str), f"Classifier: part must be a name such as 'head', got {self.part!r}")

    def attach(self, model: ModelView) -> None:
        known = model.spec.classifiers
        check(
            bool(known), f"Classifier: {model.spec.family} has no output layer of that kind; train_head trains a head"
        )
        check(self.part in known, f"Classifier: part must be one of {', '.join(known)}, got {self.part!r}")
        for parameter in model.classifier(self.part):
            parameter.requires_grad_(True)
