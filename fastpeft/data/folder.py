"""Class folders: `<root>/train/<class>/*.jpg`, likewise `test` and, where there is one, `val`.

Or `<root>/<class>/*.jpg`: then every fifth image of each class, in an order drawn once and for all, is a test image.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastpeft.data.errors import DataError
from fastpeft.data.sources import FileSource

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
# Of a class without a test set of its own, every so many-th image is for testing.
_EVERY = 5


def open_folder(root: str | Path) -> tuple[dict[str, FileSource], list[str]]:
    """List the images of a class-folder data set.

    Classes are the folders under `train`, numbered in sorted order; `val` and `test` may lack some, not add any. A
    data set with `val` and without `test`, as ImageNet is usually stored, is tested on `val` and has no validation
    split. In a folder without any of the three the class folders lie in it itself, and a fifth of each class is for
    testing.

    Returns:
        The sources `train`, `val` (if there is one) and `test`, and the class names in label order.
    """
    root = Path(root)
    if _is_bare(root):
        return _draw_test(root)
    if not (root / "train").is_dir():
        raise DataError(
            f"{root}: expected a folder with train/<class>/<image files> and the same for test, or with "
            "<class>/<image files>"
        )
    names = sorted(path.name for path in (root / "train").iterdir() if path.is_dir())
    if not names:
        raise DataError(f"{root / 'train'}: no class folders in it; expected train/<class>/<image files>")
    sources = {split: _list_split(root / split, names) for split in ("train", "val", "test") if (root / split).is_dir()}
    if "test" not in sources:
        if "val" not in sources:
            raise DataError(f"{root}: neither test/ nor val/ is there to test on")
        sources["test"] = sources.pop("val")
    return sources, names


def _is_bare(root: Path) -> bool:
    """Whether class folders with images lie in the folder itself."""
    if not root.is_dir() or any((root / split).is_dir() for split in ("train", "val", "test")):
        return False
    inner = [path for path in root.iterdir() if path.is_dir()]
    return any(file.suffix.lower() in EXTENSIONS for path in inner for file in path.iterdir())


def _draw_test(root: Path) -> tuple[dict[str, FileSource], list[str]]:
    """Training and test images of a folder of class folders."""
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    everything = _list_split(root, names)
    labels = np.array(everything.labels)
    # RandomState, because its stream never changes between NumPy versions.
    order = np.random.RandomState(0).permutation(len(labels))
    testing = np.zeros(len(labels), bool)
    for label in range(len(names)):
        members = order[labels[order] == label]
        if len(members) < 2:
            raise DataError(f"{root / names[label]}: {len(members)} images; at least two are needed, one for testing")
        testing[members[::_EVERY]] = True
    sources = {"train": everything.subset(np.flatnonzero(~testing)), "test": everything.subset(np.flatnonzero(testing))}
    return sources, names


def _list_split(folder: Path, names: list[str]) -> FileSource:
    paths, labels = [], []
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            continue
        if path.name not in names:
            raise DataError(f"{path}: this class has no folder under train/, which has: {_some(names)}")
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS)
        paths += files
        labels += [names.index(path.name)] * len(files)
    if not paths:
        raise DataError(f"{folder}: no image files in its class folders ({', '.join(sorted(EXTENSIONS))})")
    return FileSource(paths, labels)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
