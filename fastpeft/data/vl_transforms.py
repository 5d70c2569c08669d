"""What mPLUG sees of an image: random crop, flip and RandAugment in training, a plain resize otherwise.

Every draw comes from a generator that is a function of seed, epoch and sample, so that an image is the same whichever
process prepares it, and after a resumed run as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastpeft.data.errors import DataError
from fastpeft.data.rand_augment import rand_augment
from fastpeft.data.sources import read_image

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Boxes that are drawn before a crop gives up.
_TRIES = 10


def draws_of(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch."""
    return np.random.Generator(np.random.Philox(key=[seed, (epoch << 32) | sample]))


@dataclass(frozen=True)
class EvalTransform:
    """Resize to the square, ignoring the aspect ratio, and normalise.

    Attributes:
        size: Side of the model's input.
        mean: Channel means of pixels in [0, 1].
        std: Channel deviations of pixels in [0, 1].
    """

    size: int
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD
    random = False

    def __call__(self, pixels: np.ndarray, draw: np.random.Generator | None = None) -> torch.Tensor:
        """From uint8 (height, width, 3) to float32 (3, size, size)."""
        return _normalised(_resized(Image.fromarray(pixels), self.size), self.mean, self.std)


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop, flip, RandAugment, and normalise.

    Attributes:
        size: Side of the model's input.
        scale: Smallest and largest share of the image's area that a crop has.
        flip: Whether half of the images are mirrored, which makes noise of questions about left and right.
        operations: How many operations RandAugment draws; 0 leaves it out.
        mean: Channel means of pixels in [0, 1].
        std: Channel deviations of pixels in [0, 1].
    """

    size: int
    scale: tuple[float, float] = (0.5, 1.0)
    flip: bool = True
    operations: int = 2
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD
    random = True

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise DataError(f"scale: expected two shares of the area, 0 < smallest <= largest <= 1, got {self.scale}")

    def __call__(self, pixels: np.ndarray, draw: np.random.Generator) -> torch.Tensor:
        """From uint8 (height, width, 3) to float32 (3, size, size).

        Args:
            pixels: The image.
            draw: As `draws_of` makes it; as many numbers are taken from it as the image needs.
        """
        image = Image.fromarray(pixels)
        # Cropped before it is resized: the filter does not see what is outside the box.
        image = _resized(image.crop(random_crop(image.size, self.scale, draw)), self.size)
        if self.flip and draw.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return _normalised(rand_augment(image, self.operations, draw), self.mean, self.std)


class ImageFiles:
    """Images of a list of files, decoded and transformed when asked for.

    Anything else with this `read` can take its place, such as tensors that an image tower has computed once.

    Attributes:
        paths: The files.
        transform: A `TrainTransform` or a `EvalTransform`.
        seed: Of the draws.
    """

    def __init__(self, paths: Sequence[Path], transform: TrainTransform | EvalTransform, seed: int = 0) -> None:
        self.paths = paths
        self.transform = transform
        self.seed = seed

    def read(self, image: int, sample: int, epoch: int) -> torch.Tensor:
        """Image number `image` as `sample` sees it in `epoch`: two captions of an image have crops of their own.

        Raises:
            DataError: The file is not a whole image.
        """
        draw = draws_of(self.seed, epoch, sample) if self.transform.random else None
        return self.transform(read_image(self.paths[image]), draw)


def random_crop(
    size: tuple[int, int], scale: tuple[float, float], draw: np.random.Generator
) -> tuple[int, int, int, int]:
    """A box with a random share of the area and a side ratio between 3:4 and 4:3.

    Args:
        size: Width and height of the image.
        scale: Smallest and largest share.
        draw: Random numbers.

    Returns:
        Left, top, right and bottom. If ten boxes in turn do not fit, as in a very long image, the middle of the image
        with the nearest side ratio that is allowed.
    """
    width, height = size
    for _ in range(_TRIES):
        area = width * height * draw.uniform(*scale)
        ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left, top = int(draw.integers(width - across + 1)), int(draw.integers(height - down + 1))
            return left, top, left + across, top + down
    across, down = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


def _resized(image: Image.Image, size: int) -> Image.Image:
    return image.resize((size, size), Image.Resampling.BICUBIC)


def _normalised(image: Image.Image, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    planes = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
    return planes.sub_(torch.tensor(mean).view(3, 1, 1)).div_(torch.tensor(std).view(3, 1, 1)).contiguous()
