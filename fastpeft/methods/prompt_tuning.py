"""Prompt tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from fastpeft.engine.extensions import InputPrompts
from fastpeft.engine.view import ModelView
from fastpeft.methods.base import Method, check, is_count


@dataclass(frozen=True)
class PromptTuning(Method):
    """Learned rows before the input embeddings (Lester et al., 2021; the mPLUG study).

        y = F([P; x])

    They stand before the text in every stack of blocks that reads text and have no positions of their own. What they
    become is seen by all that follows; in a decoder every token sees them, and their own logits are dropped.

    Attributes:
        length: number of rows p.
    """

    name: ClassVar[str] = "prompt_tuning"
    length: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check(is_count(self.length), f"PromptTuning: length must be a positive integer, got {self.length!r}")

    def attach(self, model: ModelView) -> None:
        places = model.inputs()
        check(
            bool(places),
            f"PromptTuning: {model.spec.family} has no stack here whose input can be prompted; fastpeft.VPT puts "
            "prompts into the blocks of an image model",
        )
        for block in places:
            block.attach(self.name, InputPrompts(nn.Parameter(torch.randn(self.length, block.dim) * 0.02)))
