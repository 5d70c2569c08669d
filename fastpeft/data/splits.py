"""From the `data` section of a configuration to training, validation and test sets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastpeft.data.dataset import ImageDataset
from fastpeft.data.digits import CLASS_NAMES, open_digits, open_mnist
from fastpeft.data.draws import DRAWS, drawn_order
from fastpeft.data.errors import DataError
from fastpeft.data.fgvc import open_fgvc
from fastpeft.data.folder import open_folder
from fastpeft.data.sources import Source
from fastpeft.data.vtab import Draw, open_vtab

# Digits have no split of their own: so many train, the others test.
_DIGITS_TRAIN_SIZE = 1000


@dataclasses.dataclass(frozen=True)
class Splits:
    """The sets of one task.

    Attributes:
        train: Training images.
        val: Validation images, or None.
        test: Test images.
        class_names: Names in label order.
        deterministic: Whether a training image is the same in every epoch, so that what a frozen backbone makes of it
            can be kept.
        description: One line for the log.
    """

    train: ImageDataset
    val: ImageDataset | None
    test: ImageDataset
    class_names: list[str]
    deterministic: bool
    description: str

    @property
    def num_classes(self) -> int:
        """Number of classes, those without a training image included."""
        return len(self.class_names)


@dataclasses.dataclass(frozen=True)
class _Request:
    """What is asked for; the same fields as the `data` section of a configuration, and the same defaults."""

    name: str
    root: str | None = None
    task: str | None = None
    protocol: str = "final"
    train_list: str | None = None
    resize: str = "squash"
    augment: str = "none"
    val_fraction: float = 0.0
    train_size: int | None = None
    train_fraction: float | None = None
    val_size: int | None = None
    test_size: int | None = None
    per_class: int | None = None
    pool: str | None = None
    draw: str = "even"
    seed: int = 0

    @property
    def drawn(self) -> bool:
        """Whether VTAB's lists are drawn from."""
        return any(field is not None for field in (self.val_size, self.per_class, self.pool))

    @classmethod
    def read(cls, data: Any) -> _Request:
        fields = [field.name for field in dataclasses.fields(cls)]
        if isinstance(data, Mapping):
            if "name" not in data:
                raise DataError(f"data: 'name' is missing; expected one of {', '.join(_READERS)}")
            return cls(**{field: data[field] for field in fields if field in data})
        return cls(**{field: getattr(data, field) for field in fields if hasattr(data, field)})


def open_splits(data: Any, image_size: int, mean: Sequence[float], std: Sequence[float]) -> Splits:
    """Open a task's images. Reads lists and labels; images are decoded later.

    Args:
        data: A mapping or an object with the fields of `fastpeft.config.DataConfig`: `name` (`mnist`, `digits`, `vtab`,
            `fgvc` or `folder`), `root`, `task`, `protocol`, `train_list`, `resize`, `augment`, `val_fraction`,
            `train_size`, `train_fraction`, `val_size`, `test_size`, `per_class`, `pool`, `draw`; and `seed` of the
            draws, 0 if absent, so that runs with different training seeds see the same images.
        image_size: Side of the model's square input.
        mean: Channel means of pixels in [0, 1].
        std: Channel deviations of pixels in [0, 1].

    Raises:
        DataError: Something is missing, malformed or out of range; the message names the file.
    """
    request = _Request.read(data)
    if request.name not in _READERS:
        raise DataError(f"data: name: expected one of {', '.join(_READERS)}, got '{request.name}'")
    if request.draw not in DRAWS:
        raise DataError(f"data: draw: expected one of {', '.join(DRAWS)}, got '{request.draw}'")
    sources, class_names = _READERS[request.name](request)
    size = None if request.drawn else _train_size(request, len(sources["train"].labels))
    if size is not None and size < len(sources["train"].labels):
        chosen = np.sort(drawn_order(sources["train"].labels, request.seed, request.draw)[:size])
        sources["train"] = sources["train"].subset(chosen)
    if request.val_fraction:
        _hold_out(sources, request)
    if request.test_size is not None:
        sources["test"] = sources["test"].subset(range(min(request.test_size, len(sources["test"].labels))))

    def dataset(split: str) -> ImageDataset:
        augment = request.augment if split == "train" else "none"
        return ImageDataset(
            sources[split], image_size, mean, std, resize=request.resize, augment=augment, seed=request.seed
        )

    train, test = dataset("train"), dataset("test")
    val = dataset("val") if "val" in sources else None
    sizes = [f"{len(train):,} train"] + ([f"{len(val):,} val"] if val else []) + [f"{len(test):,} test"]
    what = f"{request.name} {request.task} ({request.protocol})" if request.name in ("vtab", "fgvc") else request.name
    description = f"{what}: {', '.join(sizes)} images, {len(class_names)} classes, {request.resize} to {image_size} px"
    return Splits(train, val, test, class_names, train.deterministic, description)


def _train_size(request: _Request, available: int) -> int | None:
    """Training images that are asked for."""
    if request.train_fraction is None:
        return request.train_size
    return max(1, round(request.train_fraction * available))


def _read_digits(request: _Request) -> tuple[dict[str, Source], list[str]]:
    """Draw the training digits, by default evenly over the classes; the others, in the same order, are the test set."""
    if request.train_fraction is not None:
        raise DataError(f"data: train_fraction: '{request.name}' has no training split of its own; give train_size")
    source = open_mnist() if request.name == "mnist" else open_digits()
    order = drawn_order(source.labels, request.seed, request.draw)
    size = request.train_size or _DIGITS_TRAIN_SIZE
    if size >= len(order):
        raise DataError(f"data: train_size {size} leaves none of the {len(order)} '{request.name}' images for testing")
    return {"train": source.subset(order[:size]), "test": source.subset(order[size:])}, CLASS_NAMES


def _read_vtab(request: _Request) -> tuple[dict[str, Source], list[str]]:
    if request.root is None or request.task is None:
        raise DataError("data: 'vtab' needs root, the folder with the task folders, and task")
    if request.val_fraction:
        raise DataError("data: val_fraction: 'vtab' has a validation list of its own; use protocol 'search'")
    draw = None
    if request.drawn:
        sizes = (request.train_size, request.val_size, request.per_class)
        draw = Draw(*sizes, request.pool, request.draw, request.seed)
    return open_vtab(request.root, request.task, request.protocol, draw)


def _read_fgvc(request: _Request) -> tuple[dict[str, Source], list[str]]:
    if request.root is None or request.task is None:
        raise DataError("data: 'fgvc' needs root, the folder with the data sets' folders, and task")
    if request.val_fraction:
        raise DataError("data: val_fraction: 'fgvc' has validation images of its own; use protocol 'search'")
    return open_fgvc(request.root, request.task, request.protocol, request.train_list)


def _read_folder(request: _Request) -> tuple[dict[str, Source], list[str]]:
    if request.root is None:
        raise DataError("data: 'folder' needs root, the folder that holds train/ and test/")
    sources, names = open_folder(request.root)
    if request.val_fraction and "val" in sources:
        raise DataError(f"data: val_fraction: {request.root} has a validation split of its own, val/")
    return sources, names


_READERS = {
    "mnist": _read_digits,
    "digits": _read_digits,
    "vtab": _read_vtab,
    "fgvc": _read_fgvc,
    "folder": _read_folder,
}


def _hold_out(sources: dict[str, Source], request: _Request) -> None:
    """Move a share of the training images, even over classes, to a validation split."""
    train = sources["train"]
    size = round(request.val_fraction * len(train.labels))
    if not 0 < size < len(train.labels):
        raise DataError(
            f"data: val_fraction {request.val_fraction} of {len(train.labels)} training images is {size}; "
            "expected at least one image in both parts"
        )
    # Another seed than the draw of the training images, which may have come from the same labels.
    order = drawn_order(train.labels, request.seed + 1, "even")
    sources["val"] = train.subset(np.sort(order[:size]))
    sources["train"] = train.subset(np.sort(order[size:]))
