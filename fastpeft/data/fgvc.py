"""The five fine-grained data sets of the FGVC benchmark: the papers' JSON splits, or the data sets' own lists.

    <root>/<data set>/train.json, val.json, test.json      one object each, {"relative/path.jpg": class id, ...}

Without train.json the lists that the data set is distributed with are read. These have no validation images, apart from
Oxford Flowers: a tenth of the training images, drawn once and for all, is held out, as the papers did.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastpeft.data import fgvc_lists
from fastpeft.data.errors import DataError
from fastpeft.data.home import Home
from fastpeft.data.sources import FileSource

# A split: the list it comes from, and path and class id of each image.
Listed = tuple[Path, list[tuple[str, Any]]]


@dataclass(frozen=True)
class FineGrained:
    """One of the data sets.

    Attributes:
        name: as in the papers' cells.
        folders: names that its folder may have.
        classes: how many it has.
        images: folder, below its own, to which the paths of the JSON splits are relative.
        lists: reads the lists it is distributed with, from its folder.
    """

    name: str
    folders: tuple[str, ...]
    classes: int
    images: str
    lists: Callable[[Path], fgvc_lists.Lists]


DATA_SETS = (
    FineGrained("cub200", ("CUB_200_2011", "cub200", "CUB"), 200, "images", fgvc_lists.birds),
    FineGrained("nabirds", ("nabirds", "NABirds"), 555, "images", fgvc_lists.birds),
    FineGrained(
        "oxford_flowers", ("OxfordFlower", "OxfordFlowers", "oxford_flowers", "flowers-102"), 102, ".",
        fgvc_lists.flowers,
    ),
    FineGrained("stanford_dogs", ("StanfordDogs", "stanford_dogs"), 120, "Images", fgvc_lists.dogs),
    FineGrained("stanford_cars", ("StanfordCars", "stanford_cars"), 196, ".", fgvc_lists.cars),
)  # fmt: skip
_HELD_OUT = 0.1


def open_fgvc(
    root: str | Path, task: str, protocol: str, train_list: str | None = None
) -> tuple[dict[str, FileSource], list[str]]:
    """List the images of a data set.

    Args:
        root: Folder that holds the data sets' folders.
        task: A data set's name, or one of the usual names of its folder.
        protocol: `search` has the validation images too; `final` has not. Both train on the same images, as the
            papers' code does.
        train_list: Another JSON list of training images than train.json, such as train_0.1.json.

    Returns:
        The sources `train`, `val` (for `search`) and `test`, and the class names in label order: the data set's own
        where its lists name them, else its class ids.

    Raises:
        DataError: A folder, a list or an image is missing, a list is malformed, a class is not one of the training
            images', or there are more classes than the data set has.
    """
    if protocol not in ("search", "final"):
        raise DataError(f"protocol: expected one of search, final, got '{protocol}'")
    kind, folder = _find(Path(root), task)
    if train_list is not None or (folder / "train.json").is_file():
        listed, images, names = _from_json(kind, folder, train_list)
    else:
        listed, images, names = _from_lists(kind, folder)
    file, samples = listed.pop("classes")
    ids = _class_ids(file, samples)
    if len(ids) > kind.classes:
        raise DataError(f"{file}: {len(ids)} classes; {kind.name} has {kind.classes}")
    if protocol == "final":
        del listed["val"]
    home, label_of = Home(images), {own: label for label, own in enumerate(ids)}
    sources = {split: _source(file, samples, home, label_of) for split, (file, samples) in listed.items()}
    return sources, [names.get(own, str(own)) for own in ids]


def known(name: str) -> FineGrained | None:
    """The data set with a name, or with a folder of that name."""
    return next((kind for kind in DATA_SETS if name == kind.name or name in kind.folders), None)


def _find(root: Path, task: str) -> tuple[FineGrained, Path]:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; data.root is the folder that holds the FGVC data sets' folders")
    kind = known(task)
    if kind is None:
        raise DataError(f"data: task: expected one of {', '.join(kind.name for kind in DATA_SETS)}, got '{task}'")
    for name in (task, *kind.folders):
        if (root / name).is_dir():
            return kind, root / name
    there = sorted(path.name for path in root.iterdir() if path.is_dir())
    raise DataError(
        f"{root}: no folder for '{kind.name}', which may be called {', '.join(kind.folders)}; "
        f"it has: {', '.join(there) or 'no folders'}"
    )


def _from_json(
    kind: FineGrained, folder: Path, train_list: str | None
) -> tuple[dict[str, Listed], Path, dict[Any, str]]:
    if train_list is not None and Path(train_list).name != train_list:
        raise DataError(f"data: train_list: expected the name of a file in {folder}, got '{train_list}'")
    files = {"train": train_list or "train.json", "val": "val.json", "test": "test.json"}
    listed = {split: (folder / file, _read_json(folder / file)) for split, file in files.items()}
    # Labels are numbered over all training images, whichever of them are used: a smaller list may lack a class.
    whole = folder / "train.json"
    listed["classes"] = listed["train"] if train_list is None else (whole, _read_json(whole))
    images = folder / kind.images
    if not images.is_dir():
        raise DataError(f"{images}: no such folder; the paths in {folder / files['train']} are relative to it")
    return listed, images, {}


def _from_lists(kind: FineGrained, folder: Path) -> tuple[dict[str, Listed], Path, dict[Any, str]]:
    lists = kind.lists(folder)
    listed = {split: (lists.file, samples) for split, samples in lists.splits.items()}
    listed["classes"] = listed["train"]
    if "val" not in listed:
        train = lists.splits["train"]
        # RandomState, because its stream never changes between NumPy versions.
        order = np.random.RandomState(0).permutation(len(train))
        held = math.ceil(_HELD_OUT * len(train))
        for split, part in (("val", order[:held]), ("train", order[held:])):
            listed[split] = (lists.file, [train[i] for i in np.sort(part)])
    return listed, folder / lists.images, lists.names


def _read_json(path: Path) -> list[tuple[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            samples = json.load(file, object_pairs_hook=lambda pairs: pairs)
    except FileNotFoundError:
        raise DataError(
            f"{path}: list file not found; an FGVC data set has train.json, val.json and test.json, each "
            "{'relative/path.jpg': class id, ...}"
        ) from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from None
    pairs = isinstance(samples, list) and all(isinstance(pair, tuple) for pair in samples)
    if not pairs or not samples:
        raise DataError(f"{path}: expected an object {{'relative/path.jpg': class id, ...}} with at least one image")
    for name, own in samples:
        if isinstance(own, bool) or not isinstance(own, (int, str)):
            raise DataError(f"{path}: '{name}': expected a class id, a whole number or a name, got {own!r}")
    if len({name for name, _ in samples}) < len(samples):
        seen: set[str] = set()
        twice = next(name for name, _ in samples if name in seen or seen.add(name))
        raise DataError(f"{path}: '{twice}' is listed twice")
    return samples


def _class_ids(file: Path, samples: Sequence[tuple[str, Any]]) -> list[Any]:
    ids = {own for _, own in samples}
    if len({type(own) for own in ids}) > 1:
        raise DataError(f"{file}: class ids are numbers in part and names in part; expected one kind")
    return sorted(ids)


def _source(file: Path, samples: Sequence[tuple[str, Any]], home: Home, label_of: dict[Any, int]) -> FileSource:
    if not samples:
        raise DataError(f"{file}: no images of one of the splits in it")
    paths, labels = [], []
    for name, own in samples:
        if own not in label_of:
            raise DataError(
                f"{file}: '{name}': class {own!r} is not one of the {len(label_of)} classes of the training images"
            )
        paths.append(home.find(name, str(file)))
        labels.append(label_of[own])
    return FileSource(paths, labels)
