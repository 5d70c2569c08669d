"""VTAB's two tasks on CLEVR, counting things and the distance of the nearest, on scenes drawn and rendered here."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from bench.made.clevr.picture import render, visible_pixels
from bench.made.clevr.scene import COUNTS, draw
from bench.made.lists import SPLITS, claim, write_file, write_lists
from fastpeft.data import DataError
from fastpeft.trainer.report import Reporter

EDGES = (8.0, 8.5, 9.0, 9.5, 10.0)
_COUNT, _DISTANCE = "clevr_count", "clevr_dist"
_CLASSES = {
    _COUNT: [f"{count} things" for count in COUNTS],
    _DISTANCE: [f"up to {edge:g}" for edge in EDGES] + [f"over {EDGES[-1]:g}"],
}
TRAINING = {"train800": 800, "val200": 200}
# Goes up when other pixels or labels come out.
_VERSION = 1


def make(out: Path, *, test: int = 2000, seed: int = 0, workers: int = 1) -> None:
    """Scenes drawn and rendered to CLEVR's rules: the tasks clevr_count and clevr_dist.

    An image is a function of the seed and its number, whatever the workers and the interruptions.

    Args:
        out: folder that gets the two task folders.
        test: test images; VTAB-1k has 15,000.
        seed: of the scenes.
        workers: processes.
    """
    if test < 1 or workers < 1 or seed < 0:
        raise DataError("clevr: --test and --workers must be at least 1, --seed at least 0")
    sizes = TRAINING | {"test": test}
    for task in _CLASSES:
        claim(out / task, {"maker": "clevr", "version": _VERSION, "seed": seed, "test": test})
    jobs = [(out, split, number, seed) for split in SPLITS for number in range(sizes[split])]
    samples = {task: {split: [] for split in SPLITS} for task in _CLASSES}
    report = Reporter(True)
    with report.bar("images", len(jobs)) as advance, ProcessPoolExecutor(workers) as pool:
        done = pool.map(_image, jobs, chunksize=4) if workers > 1 else map(_image, jobs)
        for (_, split, number, _), labels in zip(jobs, done, strict=True):
            for task, label in labels.items():
                samples[task][split].append((_place(split, number), label))
            advance(1)
    for task, names in _CLASSES.items():
        write_lists(out / task, samples[task], names)
        report.say(f"{out / task}: 800 + 200 training and {test} test images, {len(names)} classes")


def labels(scene_depths: np.ndarray) -> dict[str, int]:
    """The two tasks' labels of a scene.

    Args:
        scene_depths: of the things' centres along the camera's axis, one a thing.
    """
    nearest = float(np.min(scene_depths))
    return {_COUNT: len(scene_depths) - COUNTS.start, _DISTANCE: sum(nearest > edge for edge in EDGES)}


def _place(split: str, number: int) -> str:
    return f"images/{split}/{number:06d}.jpg"


def _image(job: tuple[Path, str, int, int]) -> dict[str, int]:
    """Draw, render and write one image unless it is there; its labels."""
    out, split, number, seed = job
    picture = out / _COUNT / _place(split, number)
    described = out / _COUNT / "scenes" / split / f"{number:06d}.json"
    # The description is written last: where it is, the picture is.
    if not described.is_file():
        rng = np.random.default_rng([seed, SPLITS.index(split), number])
        scene = draw(rng, visible_pixels)
        pixels = render(scene, rng)
        write_file(picture, lambda part: _save(pixels, part))
        write_file(described, lambda part: part.write_text(json.dumps(scene.described()) + "\n", encoding="utf-8"))
    twin = out / _DISTANCE / _place(split, number)
    if not twin.is_file():
        write_file(twin, lambda part: _link(picture, part))
    things = json.loads(described.read_text(encoding="utf-8"))["objects"]
    return labels(np.array([thing["pixel_coords"][2] for thing in things]))


def _save(pixels: np.ndarray, path: Path) -> None:
    from PIL import Image

    Image.fromarray(pixels).save(path, format="JPEG", quality=95)


def _link(source: Path, path: Path) -> None:
    """The same file under another name; a copy where the file system has no such links."""
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)
