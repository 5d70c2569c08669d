"""RandAugment as mPLUG trains with it: two of ten operations at strength 7 of 10, each applied half of the time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

# Strength 7 of 10: of a shear, of a shift in pixels, of a turn in degrees, of a brightness or sharpness.
_SHEAR, _SHIFT, _DEGREES, _FACTOR = 0.21, 7, 21, 1.36
_FILL = (128, 128, 128)


def rand_augment(image: Image.Image, operations: int, draw: np.random.Generator) -> Image.Image:
    """Draw `operations` times, with replacement, one of `OPERATIONS`, and apply each of them half of the time."""
    names = list(OPERATIONS)
    for index in draw.integers(len(names), size=operations):
        if draw.random() < 0.5:
            image = OPERATIONS[names[index]](image, 1 if draw.random() < 0.5 else -1)
    return image


def _shifted(image: Image.Image, matrix: tuple[float, float, float, float, float, float]) -> Image.Image:
    """Take pixel (x, y) from (ax + by + c, dx + ey + f); grey where that is outside."""
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR, fillcolor=_FILL
    )


def _auto_contrast(image: Image.Image, sign: int) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, sign: int) -> Image.Image:
    return ImageOps.equalize(image)


def _brightness(image: Image.Image, sign: int) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(_FACTOR)


def _sharpness(image: Image.Image, sign: int) -> Image.Image:
    return ImageEnhance.Sharpness(image).enhance(_FACTOR)


def _rotate(image: Image.Image, sign: int) -> Image.Image:
    return image.rotate(sign * _DEGREES, resample=Image.Resampling.BILINEAR, fillcolor=_FILL)


# Each takes the image and a sign of its direction, which those without a direction leave aside.
OPERATIONS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "identity": lambda image, sign: image,
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "brightness": _brightness,
    "sharpness": _sharpness,
    "shear_x": lambda image, sign: _shifted(image, (1, sign * _SHEAR, 0, 0, 1, 0)),
    "shear_y": lambda image, sign: _shifted(image, (1, 0, 0, sign * _SHEAR, 1, 0)),
    "translate_x": lambda image, sign: _shifted(image, (1, 0, sign * _SHIFT, 0, 1, 0)),
    "translate_y": lambda image, sign: _shifted(image, (1, 0, 0, 0, 1, sign * _SHIFT)),
    "rotate": _rotate,
}
