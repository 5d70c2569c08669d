"""Resize modes against their definitions, written as loops."""

from __future__ import annotations

import numpy as np
import pytest

from fastpeft.data.resize import RESIZE_MODES, center_crop, resize


def random_image(height: int, width: int, *channels: int) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (height, width, *channels)).astype(np.uint8)


def bilinear_by_loops(image: np.ndarray, size: int, half_pixel: bool) -> np.ndarray:
    height, width = image.shape[:2]
    out = np.zeros((size, size, *image.shape[2:]))
    for i in range(size):
        for j in range(size):
            shift = 0.5 if half_pixel else 0.0
            y = max((i + shift) * height / size - shift, 0)
            x = max((j + shift) * width / size - shift, 0)
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
            top = image[y0, x0] * (1 - (x - x0)) + image[y0, x1] * (x - x0)
            bottom = image[y1, x0] * (1 - (x - x0)) + image[y1, x1] * (x - x0)
            out[i, j] = top * (1 - (y - y0)) + bottom * (y - y0)
    return out


@pytest.mark.parametrize("shape", [(28, 28), (9, 14, 3), (50, 31, 3), (1, 1, 3), (16, 16, 3)])
@pytest.mark.parametrize("mode", ["squash", "squash_legacy"])
def test_squash_is_plain_bilinear(shape, mode):
    image = random_image(*shape)
    expected = bilinear_by_loops(image.astype(float), 16, half_pixel=mode == "squash")
    result = resize(image, 16, mode)
    assert result.dtype == np.uint8
    assert np.abs(result - expected).max() <= 0.501, "rounded to the nearest byte"


def test_antialias_averages_what_squash_skips():
    """Stripes one pixel wide, shrunk by 8: the filter sees grey."""
    image = np.zeros((64, 64), np.uint8)
    image[:, ::8] = 255
    filtered = resize(image, 8, "squash_antialias")[1:-1, 1:-1]
    assert filtered.min() > 20 and filtered.max() < 45
    assert resize(image, 8, "squash").max() < 1


@pytest.mark.parametrize("size, shorter", [(224, 256), (384, 438), (448, 512), (112, 128)])
def test_crop_keeps_the_aspect_ratio(size, shorter):
    result = resize(random_image(60, 90, 3), size, "crop")
    assert result.shape == (shorter, round(90 * shorter / 60), 3)
    assert center_crop(result, size).shape == (size, size, 3)


def test_nothing_to_do_changes_nothing():
    image = random_image(16, 16, 3)
    for mode in RESIZE_MODES[:3]:
        assert np.array_equal(resize(image, 16, mode), image)


def test_center_crop():
    image = np.arange(6 * 8).reshape(6, 8)
    assert np.array_equal(center_crop(image, 4), image[1:5, 2:6])
