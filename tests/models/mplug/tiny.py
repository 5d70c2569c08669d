"""A small mPLUG with everything that the large ones have, and a batch for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastpeft.models.mplug import MPlug, MPlugConfig

# Fusion layers 2..5 with stride 2: number 4 is connected, and one that attends to the image follows it.
TINY = MPlugConfig(
    image_size=32,
    patch_size=16,
    image_width=48,
    image_depth=2,
    image_heads=3,
    vocab_size=61,
    width=32,
    num_heads=4,
    intermediate=64,
    max_positions=24,
    text_layers=2,
    fusion_layers=4,
    stride=2,
    decoder_layers=2,
    cls_id=1,
    sep_id=2,
)


def make(seed: int = 0, **changes) -> MPlug:
    """In evaluation mode; weights large enough for every term to show."""
    torch.manual_seed(seed)
    model = MPlug(MPlugConfig(**{**TINY.to_dict(), **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("visual_encoder"):
                parameter.add_(0.15 * torch.randn_like(parameter))
    return model


class Rows(nn.Module):
    """An image tower that no family knows."""

    embed_dim = TINY.image_width

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(3 * 16 * 16, self.embed_dim)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.project(nn.functional.unfold(x, 16, stride=16).transpose(1, 2))


def beside_rows(seed: int = 0) -> MPlug:
    """With that tower, in evaluation mode."""
    torch.manual_seed(seed)
    return MPlug(TINY, Rows()).eval()


class Batch(NamedTuple):
    """Inputs: images, text with padding behind the second sample, decoder text likewise."""

    images: Tensor
    ids: Tensor
    mask: Tensor
    text: Tensor

    def tokens(self, model: MPlug):
        """The image tower's rows."""
        return model.encode_image(self.images)


def batch(seed: int = 1, dtype: torch.dtype = torch.float32) -> Batch:
    """Three samples."""
    torch.manual_seed(seed)
    ids = torch.randint(3, 61, (3, 5))
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1, 3:] = mask[2, 4:] = False
    text = torch.randint(3, 61, (3, 6))
    text[:, 0] = 1
    text[0, 4:] = text[2, 3:] = 0
    return Batch(torch.randn(3, 3, 32, 32, dtype=dtype), ids.masked_fill(~mask, 0), mask, text)
