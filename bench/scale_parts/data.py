"""Noise in a class's colour, as a folder of images and as captioned ones: enough for steps that are compared."""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image

_COLOURS = {"red": (200, 40, 40), "green": (40, 180, 40), "blue": (40, 40, 200), "grey": (120, 120, 120)}


def make_folder(root: Path, count: int, size: int = 64) -> Path:
    """`root/<split>/<class>/<number>.png`, `count` training images and four of test."""
    for split, total in (("train", count), ("test", len(_COLOURS))):
        for number in range(total):
            name = list(_COLOURS)[number % len(_COLOURS)]
            place = root / split / name
            place.mkdir(parents=True, exist_ok=True)
            _noise(_COLOURS[name], size, number).save(place / f"{number:03}.png")
    return root


def make_captions(root: Path, count: int, size: int = 64) -> Path:
    """`root/captions.json` of all splits, with captions of different lengths, and the images."""
    entries = []
    folder = root / "train2014_img"
    folder.mkdir(parents=True, exist_ok=True)
    for split, total in (("train", count), ("test", 1)):
        for number in range(total):
            name = list(_COLOURS)[number % len(_COLOURS)]
            file = f"{split}_{number:03}.png"
            _noise(_COLOURS[name], size, number).save(folder / file)
            raw = " ".join([f"a {name} picture", *["with some noise"] * (number % 3)])
            entries.append({"filename": file, "filepath": "train2014", "split": split, "sentences": [{"raw": raw}]})
    path = root / "captions.json"
    path.write_text(json.dumps({"images": entries}))
    return path


def _noise(colour: tuple[int, int, int], size: int, seed: int) -> Image.Image:
    noise = random.Random(seed).randbytes(3 * size * size)
    pixels = bytes(min(255, colour[i % 3] + (value >> 3)) for i, value in enumerate(noise))
    return Image.frombytes("RGB", (size, size), pixels)
