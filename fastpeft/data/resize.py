"""From an image of any size to the model's: the resize modes, all on uint8 arrays (height, width[, 3])."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

RESIZE_MODES = ("squash", "squash_legacy", "squash_antialias", "crop")


def resize(image: np.ndarray, size: int, mode: str) -> np.ndarray:
    """Bring an image to the size at which it is kept: `size` x `size`, or for `crop` a little more than `size`.

    Args:
        image: uint8, (height, width) or (height, width, 3).
        size: Side of the model's square input.
        mode: `squash` goes straight to the square, ignoring the aspect ratio: bilinear, no antialiasing (VTAB).
            `squash_legacy` samples at the grid without half-pixel centres of TensorFlow 1, as the VTAB papers' input
            pipeline did. `squash_antialias` filters before it shrinks. `crop` brings the shorter side to 8/7 of `size`
            (256 for 224), antialiased and with the aspect ratio kept; `center_crop` or a random crop follows.
    """
    if mode == "squash_legacy":
        return _legacy_bilinear(image, size)
    if mode == "crop":
        shorter = size * 8 // 7
        scale = shorter / min(image.shape[:2])
        height, width = (max(shorter, round(side * scale)) for side in image.shape[:2])
    else:
        height = width = size
    if image.shape[:2] == (height, width):
        return image
    planes = torch.from_numpy(np.atleast_3d(image)).permute(2, 0, 1)[None].float()
    planes = F.interpolate(planes, (height, width), mode="bilinear", antialias=mode != "squash")
    # A convex combination of bytes stays within them.
    return _to_bytes(planes[0].permute(1, 2, 0).numpy()).reshape(height, width, *image.shape[2:])


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """The `size` x `size` square in the middle."""
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def _legacy_bilinear(image: np.ndarray, size: int) -> np.ndarray:
    """Bilinear with output pixel i read at i * input / output, clamped at the far edge."""

    def along(axis: int, values: np.ndarray) -> np.ndarray:
        position = np.arange(size, dtype=np.float32) * np.float32(values.shape[axis] / size)
        low = np.floor(position).astype(np.int64)
        high = np.minimum(low + 1, values.shape[axis] - 1)
        weight = (position - low).reshape([-1 if i == axis else 1 for i in range(values.ndim)])
        start = values.take(low, axis)
        return start + (values.take(high, axis) - start) * weight

    return _to_bytes(along(1, along(0, image.astype(np.float32))))


def _to_bytes(values: np.ndarray) -> np.ndarray:
    return np.rint(values).astype(np.uint8)
