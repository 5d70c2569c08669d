"""VTAB-1k's tasks on TensorFlow Datasets: which data set, which slices of it, and the label of an example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.made.tfds_files import Example, Prepared

# A slice: split, first example, and the one behind the last.
Slice = tuple[str, int, int]


@dataclass(frozen=True)
class Source:
    """Where a task comes from.

    Attributes:
        task: its name in the tables.
        folder: its folder's name in the usual layout.
        data_set: of TensorFlow Datasets, with its configuration.
        version: that the papers' code used.
        classes: how many.
        slices: from the prepared data to the slices that train, validate and test.
        label: of an example.
        names: the feature whose values the labels are, if they are not binned.
        scale: what pixels are multiplied by.
    """

    task: str
    folder: str
    data_set: str
    version: str
    classes: int
    slices: Callable[[Prepared], dict[str, Slice]]
    label: Callable[[Example], int]
    names: str | None = None
    scale: int = 1


def _slices(validation: tuple[str, int], test: tuple[str, int, int], train: str = "train") -> dict[str, Slice]:
    name, start = validation
    return {"train800": (train, 0, 800), "val200": (name, start, start + 200), "test": test}


def _official(prepared: Prepared) -> dict[str, Slice]:
    """Validation images are those of the data set."""
    return _slices(("validation", 0), ("test", 0, len(prepared.split("test"))))


def _end_of_train(percent: int, test: str = "test") -> Callable[[Prepared], dict[str, Slice]]:
    """Validation images are those behind so many per cent of the training images."""

    def slices(prepared: Prepared) -> dict[str, Slice]:
        start = percent * len(prepared.split("train")) // 100
        return _slices(("train", start), (test, 0, len(prepared.split(test))))

    return slices


def _within_train(percent: int, width: int) -> Callable[[Prepared], dict[str, Slice]]:
    """Validation images are those behind so many per cent of all, and test images those behind a share more."""

    def slices(prepared: Prepared) -> dict[str, Slice]:
        count = len(prepared.split("train"))
        start, held = percent * count // 100, width * count // 100
        return _slices(("train", start), ("train", start + held, count))

    return slices


def _halves_of_test(prepared: Prepared) -> dict[str, Slice]:
    """Validation images are in the first half of the test images."""
    count = len(prepared.split("test"))
    return _slices(("test", 0), ("test", count // 2, count))


def _plain(feature: str = "label") -> Callable[[Example], int]:
    return lambda example: int(example[feature][0])


def _grouped(feature: str, values: int, classes: int) -> Callable[[Example], int]:
    """Neighbouring values are one class."""
    return lambda example: int(example[feature][0] // (values / classes))


def _bin(value: float, edges: tuple[float, ...]) -> int:
    """How many edges a value is above."""
    return sum(value > edge for edge in edges)


def _count(example: Example) -> int:
    return len(example["objects/size"]) - 3


def _nearest_thing(example: Example) -> int:
    return _bin(min(example["objects/pixel_coords"][2::3]), (8.0, 8.5, 9.0, 9.5, 10.0))


def _nearest_vehicle(example: Example) -> int:
    """Cars, vans and trucks count; without any the last class."""
    depths = zip(example["objects/type"], example["objects/location"][2::3], strict=True)
    return _bin(min([depth for kind, depth in depths if kind < 3], default=1000.0), (8.0, 20.0, 999.0))


def _labelled(task: str, data_set: str, version: str, classes: int, slices: Callable, **more: object) -> Source:
    fields = {"folder": task, "label": _plain(), "names": "label"} | more
    return Source(task=task, data_set=data_set, version=version, classes=classes, slices=slices, **fields)


def _clevr(task: str, folder: str, classes: int, label: Callable[[Example], int]) -> Source:
    return Source(task, folder, "clevr", "3.1.0", classes, _end_of_train(90, "validation"), label)


def _dsprites(task: str, folder: str, feature: str, values: int) -> Source:
    label = _grouped(feature, values, 16)
    return Source(task, folder, "dsprites", "2.0.0", 16, _within_train(80, 10), label, scale=255)


def _smallnorb(task: str, folder: str, feature: str, classes: int) -> Source:
    return Source(task, folder, "smallnorb", "2.0.0", classes, _halves_of_test, _plain(feature), feature)


SOURCES = (
    _labelled("cifar100", "cifar100", "3.0.2", 100, _end_of_train(90), folder="cifar"),
    _labelled("caltech101", "caltech101", "3.0.1", 102, _end_of_train(90)),
    _labelled("dtd", "dtd", "3.0.1", 47, _official),
    _labelled("oxford_flowers102", "oxford_flowers102", "2.1.1", 102, _official),
    _labelled("oxford_iiit_pet", "oxford_iiit_pet", "3.2.0", 37, _end_of_train(80)),
    _labelled("svhn", "svhn_cropped", "3.0.0", 10, _end_of_train(90)),
    _labelled("sun397", "sun397/tfds", "4.0.0", 397, _official),
    _labelled("patch_camelyon", "patch_camelyon", "2.0.0", 2, _official),
    _labelled("eurosat", "eurosat/rgb", "2.0.0", 10, _within_train(60, 20)),
    _labelled("resisc45", "resisc45", "3.0.0", 45, _within_train(60, 20)),
    _labelled("diabetic_retinopathy", "diabetic_retinopathy_detection/btgraham-300", "3.0.0", 5, _official),
    _clevr("clevr_count", "clevr_count", 8, _count),
    _clevr("clevr_distance", "clevr_dist", 6, _nearest_thing),
    _labelled("dmlab", "dmlab", "2.0.1", 6, _official),
    Source("kitti", "kitti", "kitti", "3.2.0", 4, _official, _nearest_vehicle),
    _dsprites("dsprites_location", "dsprites_loc", "label_x_position", 32),
    _dsprites("dsprites_orientation", "dsprites_ori", "label_orientation", 40),
    _smallnorb("smallnorb_azimuth", "smallnorb_azi", "label_azimuth", 18),
    _smallnorb("smallnorb_elevation", "smallnorb_ele", "label_elevation", 9),
)
