"""Sizes of an mPLUG model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fastpeft.errors import FastPEFTError


@dataclass(frozen=True)
class MPlugConfig:
    """Sizes, rates and token ids.

    Attributes:
        image_size: pixels a side.
        patch_size: pixels a side of a patch.
        image_width: of the image tower; another than `width` brings a projection with it.
        image_depth, image_heads: of the image tower.
        vocab_size: tokens.
        width: of everything that is not the image tower.
        num_heads: of the same.
        intermediate: hidden units of its feed-forward layers.
        max_positions: longest text.
        text_layers: of the text encoder.
        fusion_layers: of the skip-connected fusion.
        stride: every `stride`-th fusion layer, the first one excluded, is connected.
        decoder_layers: of the decoder.
        dropout: behind embeddings and output layers.
        attention_dropout: on attention's weights, of the image tower too.
        layer_norm_eps: of everything that is not the image tower.
        pad_id, cls_id, sep_id: tokens.
    """

    image_size: int = 256
    patch_size: int = 16
    image_width: int = 768
    image_depth: int = 12
    image_heads: int = 12
    vocab_size: int = 30522
    width: int = 768
    num_heads: int = 12
    intermediate: int = 3072
    max_positions: int = 512
    text_layers: int = 6
    fusion_layers: int = 6
    stride: int = 3
    decoder_layers: int = 12
    dropout: float = 0.1
    attention_dropout: float = 0.1
    layer_norm_eps: float = 1e-12
    pad_id: int = 0
    cls_id: int = 101
    sep_id: int = 102

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or isinstance(value, bool)):
                raise FastPEFTError(f"{field.name} must be an integer, got {value!r}")
        for part, width, heads in (
            ("image_width", self.image_width, self.image_heads),
            ("width", self.width, self.num_heads),
        ):
            if heads < 1 or width < 1 or width % heads:
                raise FastPEFTError(f"{part} must be a positive multiple of its {heads} heads, got {width}")
        if self.patch_size < 1 or self.image_size < 1 or self.image_size % self.patch_size:
            raise FastPEFTError(
                f"image_size must be a multiple of the patch size {self.patch_size}, got {self.image_size}"
            )
        for name in (
            *("text_layers", "fusion_layers", "decoder_layers", "stride", "image_depth"),
            *("max_positions", "vocab_size", "intermediate"),
        ):
            if getattr(self, name) < 1:
                raise FastPEFTError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("dropout", "attention_dropout"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise FastPEFTError(f"{name} must be in [0, 1), got {value!r}")

    @classmethod
    def base(cls, image_size: int = 256, **changes) -> MPlugConfig:
        """mPLUG-base: ViT-B/16, one BERT-base split into text encoder and fusion, another as decoder."""
        return cls(image_size=image_size, **changes)

    @classmethod
    def large(cls, image_size: int = 336, **changes) -> MPlugConfig:
        """mPLUG-large: ViT-L/14; no fusion layer is connected."""
        sizes = {"patch_size": 14, "image_width": 1024, "image_depth": 24, "image_heads": 16, "stride": 6}
        return cls(image_size=image_size, **{**sizes, **changes})

    @property
    def image_tokens(self) -> int:
        """Patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def fusion_numbers(self) -> range:
        """Numbers of the fusion's layers in a state dict: they go on where the text encoder's end."""
        return range(self.text_layers, self.text_layers + self.fusion_layers)

    def connected(self, number: int) -> bool:
        """Whether the fusion layer of this number is a connected one."""
        order = number - self.text_layers
        return order != 0 and order % self.stride == 0

    def to_dict(self) -> dict[str, int | float]:
        """As JSON can hold it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, int | float]) -> MPlugConfig:
        """From what `to_dict` gave.

        Raises:
            FastPEFTError: a field that is not one.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise FastPEFTError(f"a model of mPLUG has no size {unknown[0]!r}; it has: {', '.join(sorted(known))}")
        return cls(**values)
