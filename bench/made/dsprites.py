"""dSprites drawn anew from its published factors: location and orientation, VTAB's two tasks on it.

The data set (Matthey et al., 2017) is every combination of

    shape        square, ellipse, heart
    scale        6 values linear in [0.5, 1]
    orientation  40 values linear in [0, 2 pi], both ends among them
    x, y         32 values each, linear in [0, 1]

as binary images of 64 x 64 pixels. VTAB groups the 32 horizontal positions and the 40 orientations into 16 classes
each, tiles the image to three channels and multiplies it by 255. The factors do not say how large a shape of scale 1
is, or which pixels the positions span: here no shape ever touches the border, and positions are about a pixel apart.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from bench.made.lists import write_file, write_lists
from fastpeft.data.errors import DataError

SIZE = 64
SHAPES = ("square", "ellipse", "heart")
# Values of shape, scale, orientation, x, y.
FACTORS = (3, 6, 40, 32, 32)
CLASSES = 16
# Of the positions 0 and 1, in pixels; half the side of a square of scale 1, whose corners stay 1 pixel inside.
_FIRST, _LAST, _HALF = 16.0, 48.0, 10.5
# The folder of a task, and which factor its label is of.
TASKS = {"dsprites_loc": 3, "dsprites_ori": 2}


def make(out: Path, seed: int = 0, test: int = 2000) -> None:
    """Draw dSprites' location and orientation tasks, to its published factors.

    Args:
        out: folder that gets the task folders dsprites_loc and dsprites_ori.
        seed: of the draw of 1,000 training images and the test images from all 737,280.
        test: number of test images; the papers have 73,728.
    """
    total = math.prod(FACTORS)
    if not 0 < test <= total - 1000:
        raise DataError(f"test: expected 1 to {total - 1000} images, got {test}")
    chosen = np.random.default_rng(seed).choice(total, 1000 + test, replace=False)
    splits = {"train800": chosen[:800], "val200": chosen[800:1000], "test": chosen[1000:]}
    for task, factor in TASKS.items():
        samples = {}
        for split, numbers in splits.items():
            samples[split] = []
            for count, number in enumerate(numbers):
                factors = np.unravel_index(int(number), FACTORS)
                path = f"images/{split}/{count:06d}.png"
                write_file(out / task / path, lambda part, factors=factors: _save(draw(*factors), part))
                samples[split].append((path, label(int(factors[factor]), FACTORS[factor])))
        write_lists(out / task, samples)


def label(value: int, values: int) -> int:
    """The class of a factor's value: VTAB groups its `values` values evenly into 16."""
    return int(value // (values / CLASSES))


def draw(shape: int, scale: int, orientation: int, x: int, y: int) -> np.ndarray:
    """One image from the numbers of its factors' values.

    Returns:
        (64, 64) booleans, rows from the top.
    """
    size = _HALF * np.linspace(0.5, 1, FACTORS[1])[scale]
    angle = np.linspace(0, 2 * np.pi, FACTORS[2])[orientation]
    column, row = (np.linspace(_FIRST, _LAST, FACTORS[3])[place] for place in (x, y))
    pixels = np.arange(SIZE) + 0.5
    right, down = np.meshgrid((pixels - column) / size, (pixels - row) / size)
    # The pixel in the shape's own frame, upwards positive: turned back by the shape's angle.
    u = math.cos(angle) * right - math.sin(angle) * down
    v = -math.sin(angle) * right - math.cos(angle) * down
    return _INSIDE[SHAPES[shape]](u, v)


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # The sextic heart reaches from -1 to 1.24 upwards and 1.14 to either side.
    u, v = 1.14 * u, 1.14 * v + 0.1
    return (u * u + v * v - 1) ** 3 <= u * u * v**3


_INSIDE = {
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 1,
    "ellipse": lambda u, v: u * u + (v / 0.6) ** 2 <= 1,
    "heart": _heart,
}


def _save(image: np.ndarray, path: Path) -> None:
    from PIL import Image

    Image.fromarray(image.astype(np.uint8) * 255).convert("RGB").save(path, "PNG")
