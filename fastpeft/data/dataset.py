"""The map-style dataset that the trainer reads: resized once, kept in memory, normalised when asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from fastpeft.data.errors import DataError
from fastpeft.data.resize import RESIZE_MODES, center_crop, resize
from fastpeft.data.sources import Source, read_image

AUGMENTATIONS = ("none", "flip", "crop_flip")
# A thousand-image task takes 0.15 GB at 224 pixels; VTAB's largest test sets would take 6 and are decoded as they go.
DEFAULT_CACHE_BYTES = 2 * 2**30


class ImageDataset(Dataset):
    """Images as normalised float32 tensors (3, size, size), with int labels.

    Resized images are kept in memory as uint8 up to `cache_bytes`, so that only the first epoch decodes; what is over
    the bound is decoded again each time. Worker processes of a loader start from what the dataset holds when they are
    forked: call `preload` first, or each decodes for itself.

    Attributes:
        labels: One int an image.
        deterministic: Whether an image is the same in every epoch.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        resize: str = "squash",
        augment: str = "none",
        seed: int = 0,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        """Prepare to read; nothing is decoded yet.

        Args:
            source: Images at their own size, and labels.
            size: Side of the model's square input.
            mean: Channel means of pixels in [0, 1].
            std: Channel deviations of pixels in [0, 1].
            resize: One of `RESIZE_MODES`.
            augment: `none`; `flip` mirrors half of the images; `crop_flip` also crops at random, which needs
                `resize="crop"`. The draw is a function of seed, epoch and image, so that resuming repeats it.
            seed: Of the augmentation.
            cache_bytes: Bound of the memory for resized images.
        """
        _check_choice("resize", resize, RESIZE_MODES)
        _check_choice("augment", augment, AUGMENTATIONS)
        if augment == "crop_flip" and resize != "crop":
            raise DataError(f"augment 'crop_flip' needs resize 'crop', which leaves room to crop, got '{resize}'")
        self.source = source
        self.labels = list(source.labels)
        self.size = size
        self.resize = resize
        self.augment = augment
        self.deterministic = augment == "none"
        self.seed = seed
        self.epoch = 0
        self._scale, self._shift = _normalisation(mean, std)
        self._kept: dict[int, np.ndarray] = {}
        self._room = cache_bytes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return self._normalise(self._view(self._resized(index), index)), self.labels[index]

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentation's draw; call before the epoch's loader starts."""
        self.epoch = epoch

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What is done with pixels, in plain values: of one image, datasets that agree here make the same input."""
        return {
            "size": self.size,
            "resize": self.resize,
            "augment": self.augment,
            "scale": self._scale.flatten().tolist(),
            "shift": self._shift.flatten().tolist(),
        }

    def preload(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Decode now whatever fits into memory, so that a broken file shows before training.

        Args:
            progress: Called with (done, total) after each image.
        """
        done = 0
        # Decoders and resizing release the interpreter lock.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for start in range(0, len(self), 64):
                if self._room <= 0:
                    return
                chunk = range(start, min(start + 64, len(self)))
                for index, image in zip(chunk, pool.map(self._resized_now, chunk), strict=True):
                    self._keep(index, image)
                    done += 1
                    if progress is not None:
                        progress(done, len(self))

    def _resized(self, index: int) -> np.ndarray:
        kept = self._kept.get(index)
        if kept is not None:
            return kept
        image = self._resized_now(index)
        self._keep(index, image)
        return image

    def _resized_now(self, index: int) -> np.ndarray:
        kept = self._kept.get(index)
        return kept if kept is not None else resize(self.source.read(index), self.size, self.resize)

    def _keep(self, index: int, image: np.ndarray) -> None:
        if index not in self._kept and image.nbytes <= self._room:
            self._kept[index] = image
            self._room -= image.nbytes

    def _view(self, image: np.ndarray, index: int) -> np.ndarray:
        """The square of the image that this epoch sees."""
        if self.deterministic:
            return center_crop(image, self.size)
        draw = np.random.Generator(np.random.Philox(key=[self.seed, (self.epoch << 32) | index]))
        if self.augment == "crop_flip":
            top, left = (int(draw.integers(side - self.size + 1)) for side in image.shape[:2])
            image = image[top : top + self.size, left : left + self.size]
        else:
            image = center_crop(image, self.size)
        return image[:, ::-1] if draw.random() < 0.5 else image

    def _normalise(self, image: np.ndarray) -> torch.Tensor:
        if image.ndim == 2:
            planes = torch.from_numpy(np.ascontiguousarray(image))[None]
        else:
            planes = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return planes * self._scale + self._shift


def load_image(
    path: str | Path, size: int, mean: Sequence[float], std: Sequence[float], *, resize: str = "squash"
) -> torch.Tensor:
    """One image file as a model's input, prepared as `ImageDataset` prepares a test image.

    Returns:
        float32, (3, size, size).
    """
    return ImageDataset(_OneFile(Path(path)), size, mean, std, resize=resize, cache_bytes=0)[0][0]


class _OneFile:
    """A source of one unlabelled file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.labels = [0]

    def read(self, index: int) -> np.ndarray:
        return read_image(self.path)


def _normalisation(mean: Sequence[float], std: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor and offset, (3, 1, 1) each, from bytes straight to normalised values."""
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise DataError(f"expected three means and three positive deviations, got {list(mean)} and {list(std)}")
    deviations = torch.tensor(std, dtype=torch.float64).view(3, 1, 1)
    means = torch.tensor(mean, dtype=torch.float64).view(3, 1, 1)
    return (1 / (255 * deviations)).float(), (-means / deviations).float()


def _check_choice(what: str, given: str, valid: Sequence[str]) -> None:
    if given not in valid:
        raise DataError(f"{what}: expected one of {', '.join(valid)}, got '{given}'")
