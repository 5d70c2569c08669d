"""Where pixels come from: image files, or arrays that are already in memory. Both hand out uint8 arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from fastpeft.data.errors import DataError


class Source(Protocol):
    """Images at their own size, with labels."""

    labels: Sequence[int]

    def read(self, index: int) -> np.ndarray:
        """Image `index` as uint8, (height, width) for grey or (height, width, 3)."""

    def subset(self, indices: Iterable[int]) -> Source:
        """The same kind of source with only these images, in this order."""


class FileSource:
    """Image files, decoded when read."""

    def __init__(self, paths: Sequence[Path], labels: Sequence[int]) -> None:
        self.paths = list(paths)
        self.labels = list(labels)

    def read(self, index: int) -> np.ndarray:
        """Decode one file."""
        return read_image(self.paths[index])

    def subset(self, indices: Iterable[int]) -> FileSource:
        """The files at `indices`."""
        indices = list(indices)
        return FileSource([self.paths[i] for i in indices], [self.labels[i] for i in indices])

    @classmethod
    def joined(cls, parts: Sequence[FileSource]) -> FileSource:
        """One behind the other."""
        return cls([path for part in parts for path in part.paths], [label for part in parts for label in part.labels])


class ArraySource:
    """Images in one array."""

    def __init__(self, images: np.ndarray, labels: Sequence[int]) -> None:
        self.images = images
        self.labels = [int(label) for label in labels]

    def read(self, index: int) -> np.ndarray:
        """One image of the array."""
        return self.images[index]

    def subset(self, indices: Iterable[int]) -> ArraySource:
        """The images at `indices`."""
        indices = np.asarray(list(indices), dtype=np.int64)
        return ArraySource(self.images[indices], [self.labels[i] for i in indices])


def read_image(path: str | Path) -> np.ndarray:
    """Decode an image file to RGB.

    Returns:
        uint8, (height, width, 3).

    Raises:
        DataError: The file cannot be read or is not a whole image; the message names it.
    """
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise DataError(f"{path}: reading image files needs Pillow: pip install pillow") from None
    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    # Pillow's decoders raise many kinds of errors on bytes that are not an image.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as an image: {error}") from error
