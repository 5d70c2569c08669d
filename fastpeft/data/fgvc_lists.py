"""The lists that the fine-grained data sets come with: text files of the birds, MATLAB files of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastpeft.data.errors import DataError

Samples = list[tuple[str, int]]


@dataclass(frozen=True)
class Lists:
    """What a data set's own lists say.

    Attributes:
        file: the list that is named in messages.
        splits: `train`, `test` and, for Oxford Flowers, `val`: path and class id of each image.
        images: folder, below the data set's, to which the paths are relative.
        names: of classes, by id; may lack some.
    """

    file: Path
    splits: dict[str, Samples]
    images: str
    names: dict[int, str] = field(default_factory=dict)


def birds(folder: Path) -> Lists:
    """CUB-200-2011 and NABirds: images.txt, image_class_labels.txt, train_test_split.txt, and classes.txt for names."""
    paths = _table(folder / "images.txt")
    labels = _table(folder / "image_class_labels.txt")
    training = _table(folder / "train_test_split.txt")
    splits: dict[str, Samples] = {"train": [], "test": []}
    for image, path in paths.items():
        for file, table in (("image_class_labels.txt", labels), ("train_test_split.txt", training)):
            if image not in table:
                raise DataError(f"{folder / file}: image {image} of images.txt is not in it")
        label, split = labels[image], training[image]
        if not label.isdecimal():
            raise DataError(
                f"{folder / 'image_class_labels.txt'}: image {image}: expected a class number, got '{label}'"
            )
        if split not in ("0", "1"):
            raise DataError(f"{folder / 'train_test_split.txt'}: image {image}: expected 1 or 0, got '{split}'")
        splits["train" if split == "1" else "test"].append((path, int(label)))
    has_names = (folder / "classes.txt").is_file()
    names = {int(own): name for own, name in _table(folder / "classes.txt").items()} if has_names else {}
    return Lists(folder / "images.txt", splits, "images", names)


def flowers(folder: Path) -> Lists:
    """Oxford Flowers: imagelabels.mat and setid.mat, images jpg/image_00001.jpg and so on."""
    file = folder / "setid.mat"
    labels = _numbers(folder / "imagelabels.mat", "labels")
    splits = {}
    for split, key in (("train", "trnid"), ("val", "valid"), ("test", "tstid")):
        numbers = _numbers(file, key)
        if len(numbers) and not 1 <= min(numbers) <= max(numbers) <= len(labels):
            raise DataError(f"{file}: {key}: expected numbers from 1 to {len(labels)}, the labels of imagelabels.mat")
        splits[split] = [(f"image_{number:05d}.jpg", labels[number - 1]) for number in numbers]
    return Lists(file, splits, "jpg")


def dogs(folder: Path) -> Lists:
    """Stanford Dogs: train_list.mat and test_list.mat, here or in lists/."""
    home = folder / "lists" if (folder / "lists").is_dir() else folder
    splits: dict[str, Samples] = {}
    for split in ("train", "test"):
        file = home / f"{split}_list.mat"
        paths = [str(path) for path in np.atleast_1d(_field(file, "file_list"))]
        splits[split] = _paired(file, paths, _numbers(file, "labels"))
    # n02085620-Chihuahua/n02085620_5927.jpg
    names = {own: path.split("/")[0].partition("-")[2] for path, own in splits["train"]}
    return Lists(home / "train_list.mat", splits, "Images", {own: name for own, name in names.items() if name})


def cars(folder: Path) -> Lists:
    """Stanford Cars: the development kit with cars_train/ and cars_test/, or cars_annos.mat with car_ims/."""
    if (folder / "cars_annos.mat").is_file():
        file = folder / "cars_annos.mat"
        rows = _rows(file, ("relative_im_path", "class", "test"))
        splits = {"train": [row[:2] for row in rows if not row[2]], "test": [row[:2] for row in rows if row[2]]}
        names = _names(file)
    else:
        file = folder / "devkit" / "cars_train_annos.mat"
        with_labels = "cars_test_annos_withlabels.mat"
        test = next((path for path in (folder / with_labels, folder / "devkit" / with_labels) if path.is_file()), None)
        if file.is_file() and test is None:
            raise DataError(
                f"{folder / with_labels}: not found; the development kit itself has no labels of the test images"
            )
        splits = {
            split: [(f"cars_{split}/{name}", own) for name, own in _rows(part, ("fname", "class"))]
            for split, part in (("train", file), ("test", test or folder / with_labels))
        }
        meta = folder / "devkit" / "cars_meta.mat"
        names = _names(meta) if meta.is_file() else {}
    return Lists(
        file, {split: [(str(path), int(own)) for path, own in part] for split, part in splits.items()}, ".", names
    )


def _names(file: Path) -> dict[int, str]:
    return {own: str(name) for own, name in enumerate(np.atleast_1d(_field(file, "class_names")), start=1)}


def _paired(file: Path, paths: Sequence[str], labels: Sequence[int]) -> Samples:
    if len(paths) != len(labels):
        raise DataError(f"{file}: {len(paths)} images and {len(labels)} labels")
    return list(zip(paths, labels, strict=True))


def _table(file: Path) -> dict[str, str]:
    """The lines `key value` of a text file, in order."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise _missing(file) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as a list: {error}") from None
    found = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        key, _, value = line.strip().partition(" ")
        if not value:
            raise DataError(f"{file}:{number}: expected two columns, got '{line.strip()}'")
        found[key] = value.strip()
    return found


def _missing(file: Path) -> DataError:
    return DataError(
        f"{file}: not found; expected the JSON splits train.json, val.json and test.json in the data set's folder, or "
        "the lists that it is distributed with"
    )


def _numbers(file: Path, key: str) -> list[int]:
    values = np.asarray(_field(file, key)).ravel()
    try:
        return [int(number) for number in values]
    except (TypeError, ValueError):
        raise DataError(f"{file}: {key}: expected numbers") from None


def _rows(file: Path, keys: tuple[str, ...]) -> list[tuple[Any, ...]]:
    """Fields of the annotations, one row an image."""
    rows = []
    for number, one in enumerate(np.atleast_1d(_field(file, "annotations")), start=1):
        lacking = [key for key in keys if not isinstance(one, dict) or key not in one]
        if lacking:
            raise DataError(f"{file}: annotation {number} has no field '{lacking[0]}'")
        rows.append(tuple(one[key] for key in keys))
    return rows


def _field(file: Path, key: str) -> Any:
    """A variable of a MATLAB file."""
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError:
        raise DataError(f"{file}: reading MATLAB files needs SciPy: pip install scipy") from None
    if not file.is_file():
        raise _missing(file)
    try:
        return loadmat(file, simplify_cells=True)[key]
    except KeyError:
        raise DataError(f"{file}: no variable '{key}' in it") from None
    # SciPy's reader raises many kinds of errors on bytes that are not a MATLAB file.
    except Exception as error:
        raise DataError(f"{file}: cannot be read as a MATLAB file: {error}") from error
