"""The models that are measured, and what is put into them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.cases import batch, create_model

CLASSES = 100
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
VIT_B, VIT_S, VIT_L, VIT_H = (
    "vit_base_patch16_224",
    "vit_small_patch14_dinov2",
    "vit_large_patch16_224",
    "vit_huge_patch14_224",
)
# Width and heads in little: the head dimensions of the real models, where that matters.
_TINY = {VIT_H: (160, 2)}


@dataclass(frozen=True)
class Shape:
    """A model, what is put into it, and on how many threads.

    Attributes:
        model: timm name; 224 pixels.
        batch: images a step.
        dtype: key of `DTYPES`.
        threads: of torch and of the native library.
        tiny: two narrow blocks, 32 or 28 pixels and two images instead.
    """

    model: str
    batch: int
    dtype: str = "bf16"
    threads: int = 2
    tiny: bool = False

    def __str__(self) -> str:
        return f"{self.model}/b{self.batch}/{self.dtype}/{self.threads}t"

    @property
    def image_size(self) -> int:
        """Pixels."""
        return (28 if "patch14" in self.model else 32) if self.tiny else 224

    @property
    def images(self) -> int:
        """Images a step, in little fewer than the name says."""
        return min(self.batch, 2) if self.tiny else self.batch

    def input(self) -> tuple[Tensor, Tensor]:
        """Images and labels."""
        return batch(self.images, self.image_size, CLASSES, DTYPES[self.dtype], "cpu")


class Models:
    """Copies of plain models; the last one is kept, since rows of one model follow on each other."""

    def __init__(self) -> None:
        self._key: tuple | None = None
        self._model: nn.Module | None = None

    def copy(self, shape: Shape) -> nn.Module:
        """A plain timm model with weights of its own."""
        key = (shape.model, shape.dtype, shape.tiny)
        if self._key != key:
            self._key = self._model = None
            width, heads = _TINY.get(shape.model, (128, 2))
            options = {"depth": 2, "embed_dim": width, "num_heads": heads} if shape.tiny else {}
            model = create_model(shape.model, CLASSES, shape.image_size, **options)
            self._key, self._model = key, model.to(DTYPES[shape.dtype])
        return copy.deepcopy(self._model)
