"""Small data sets on disk in the layouts of the real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (12, 9)) -> np.ndarray:
    """A random picture of width x height `size`, without loss if the name ends in .png; returns its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def write_vtab(root: Path, task: str = "cifar", train: int = 5, val: int = 3, test: int = 4, classes: int = 3) -> Path:
    """A VTAB-1k task folder; returns it."""
    folder = root / task
    counts = {"train800": train, "val200": val, "train800val200": train + val, "test": test}
    for seed, (split, count) in enumerate(counts.items()):
        lines = []
        for index in range(count):
            relative = f"images/{split}/{index:06d}.jpg"
            write_image(folder / relative, seed=1000 * seed + index)
            lines.append(f"{relative} {index % classes}\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


def write_folders(root: Path, splits: dict[str, dict[str, int]]) -> Path:
    """Class folders: split -> class -> number of images; returns `root`."""
    for split, counts in splits.items():
        for name, count in counts.items():
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                write_image(root / split / name / f"{index}.png", seed=index)
    return root
