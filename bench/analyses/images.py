"""Sets of images as a command names them: `[NAME=]WHERE[:SPLIT]`.

WHERE is a VTAB-1k task folder, a folder of train/<class>/<images>, any other folder of images, or `mnist` or `digits`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench.analyses.errors import AnalysisError
from fastpeft.data import ImageDataset, open_splits
from fastpeft.data.folder import EXTENSIONS
from fastpeft.data.sources import FileSource, Source
from fastpeft.trainer.report import Reporter

SPLITS = ("train", "val", "test")
_WORDS = ("mnist", "digits")
_NO_SPLIT = "all"


@dataclass(frozen=True)
class ImageSet:
    """Images at their own size.

    Attributes:
        name: for tables and figures.
        split: of the data set, or "all".
        source: the images and labels.
        class_names: by label; None if the images have no labels.
    """

    name: str
    split: str
    source: Source
    class_names: list[str] | None

    def __len__(self) -> int:
        return len(self.source.labels)

    def thinned(self, count: int | None, seed: int) -> ImageSet:
        """At most so many of the images, drawn at random and kept in their order."""
        if count is None or count >= len(self):
            return self
        chosen = np.sort(np.random.RandomState(seed).permutation(len(self))[:count])
        return ImageSet(self.name, self.split, self.source.subset(chosen), self.class_names)

    def file(self, index: int) -> str:
        """Where an image is: its path, or its number."""
        return str(self.source.paths[index]) if isinstance(self.source, FileSource) else f"{self.name} {index}"


def open_set(text: str, split: str) -> ImageSet:
    """Read the lists of a set; images are decoded later.

    Args:
        text: `[NAME=]WHERE[:SPLIT]`.
        split: where the text names none.

    Raises:
        AnalysisError: there is nothing of the kind there.
        DataError: a list or a folder in it is malformed.
    """
    named, equals, where = text.rpartition("=")
    if equals and not named:
        raise AnalysisError(f"--data {text}: expected [NAME=]WHERE[:SPLIT], the name is empty")
    for known in SPLITS:
        if where.endswith(f":{known}"):
            where, asked = where.removesuffix(f":{known}"), known
            break
    else:
        asked = None
    path = Path(where)
    name = named or path.resolve().name
    request = _request(path, asked or split)
    if request is None:
        if asked:
            raise AnalysisError(f"--data {text}: {where} is a plain folder of images, which has no split '{asked}'")
        return ImageSet(name, _NO_SPLIT, FileSource(*_all_below(path)), None)
    # Sizes and normalisation are those of the model that will read the images.
    splits = open_splits(request, 8, (0, 0, 0), (1, 1, 1))
    chosen = getattr(splits, asked or split)
    if chosen is None:
        raise AnalysisError(f"--data {text}: there is no split '{asked or split}'")
    return ImageSet(name, asked or split, chosen.source, splits.class_names)


def open_files(paths: list[Path]) -> ImageSet:
    """Image files without labels.

    Raises:
        AnalysisError: one of them is not there.
    """
    for path in paths:
        if not path.is_file():
            raise AnalysisError(f"{path}: no such image file")
    return ImageSet("files", _NO_SPLIT, FileSource(paths, [0] * len(paths)), None)


def _request(path: Path, split: str) -> dict[str, str] | None:
    """What the trainer's readers are asked for; None for a plain folder."""
    if str(path) in _WORDS:
        return {"name": str(path)}
    if not path.is_dir():
        raise AnalysisError(f"{path}: no such folder, and neither of the words {' and '.join(_WORDS)}")
    if (path / "test.txt").is_file() or (path / "train800val200.txt").is_file():
        whole = path.resolve()
        protocol = "search" if split == "val" else "final"
        return {"name": "vtab", "root": str(whole.parent), "task": whole.name, "protocol": protocol}
    return {"name": "folder", "root": str(path)} if (path / "train").is_dir() else None


def _all_below(path: Path) -> tuple[list[Path], list[int]]:
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS and file.is_file())
    if not files:
        raise AnalysisError(f"{path}: no image files in it ({', '.join(sorted(EXTENSIONS))})")
    return files, [0] * len(files)


def batches(images: ImageDataset, size: int, what: str, say: Reporter) -> Iterator[torch.Tensor]:
    """Normalised images (B, 3, side, side) in their order, under a progress bar."""
    with say.bar(what, len(images)) as advance:
        for start in range(0, len(images), size):
            stop = min(start + size, len(images))
            yield torch.stack([images[index][0] for index in range(start, stop)])
            advance(stop - start)
