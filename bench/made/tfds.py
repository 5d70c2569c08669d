"""VTAB-1k's task folders from what TensorFlow Datasets has prepared; needs neither it nor TensorFlow."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench.made.lists import SPLITS, claim, write_file, write_lists
from bench.made.tfds_files import Prepared, find
from bench.made.tfds_tasks import SOURCES, Source
from bench.tables.errors import unknown
from fastpeft.data import DataError
from fastpeft.trainer.report import Reporter

_MAGIC = {b"\xff\xd8\xff": ".jpg", b"\x89PNG\r\n\x1a\n": ".png"}


def make(out: Path, *, tfds_dir: Path, task: str = "all") -> None:
    """VTAB-1k's tasks from data sets that TensorFlow Datasets has prepared, by the protocol's slices and labels.

    Images are written as they are stored, without encoding them again.

    Args:
        out: folder that gets the task folders.
        tfds_dir: TensorFlow Datasets' data folder.
        task: a task, or "all" for those whose data set is there.
    """
    report = Reporter(True)
    if task != "all":
        source = next((one for one in SOURCES if task in (one.task, one.folder)), None)
        if source is None:
            raise unknown("task", task, [*(one.task for one in SOURCES), "all"])
        _convert(source, find(tfds_dir, source.data_set, source.version), out, report)
        return
    if not tfds_dir.is_dir():
        raise DataError(f"{tfds_dir}: no such folder; --tfds-dir is TensorFlow Datasets' data folder")
    there = [source for source in SOURCES if (tfds_dir / source.data_set).is_dir()]
    if not there:
        raise DataError(f"{tfds_dir}: none of VTAB-1k's data sets is prepared in it")
    for source in there:
        _convert(source, find(tfds_dir, source.data_set, source.version), out, report)
    if len(there) < len(SOURCES):
        report.say(f"not prepared: {', '.join(source.task for source in SOURCES if source not in there)}")


def _convert(source: Source, prepared: Prepared, out: Path, report: Reporter) -> None:
    """Write one task's folder."""
    folder = out / source.folder
    slices = source.slices(prepared)
    for name, start, stop in slices.values():
        count = len(prepared.split(name))
        if stop > count or start >= stop:
            raise DataError(
                f"{prepared.folder}: split '{name}' has {count:,} examples; {source.task} needs those from {start:,} "
                f"to {stop:,}"
            )
    if prepared.version != source.version:
        report.warn(
            f"{source.task}: version {prepared.version} of {source.data_set}; the papers' is {source.version}, "
            "whose images may differ"
        )
    claim(folder, {"maker": "tfds", "task": source.task, "data_set": source.data_set, "version": prepared.version})
    samples: dict[str, list[tuple[str, int]]] = {}
    with report.bar(source.task, sum(stop - start for _, start, stop in slices.values())) as advance:
        for split in SPLITS:
            samples[split] = []
            for sample in _written(source, prepared, slices[split], folder, split):
                samples[split].append(sample)
                advance(1)
    names = prepared.label_names(source.names) if source.names else None
    write_lists(folder, samples, names if names and len(names) == source.classes else None)
    sizes = ", ".join(f"{len(samples[split]):,} {split}" for split in SPLITS)
    report.say(f"{folder}: {sizes}, {source.classes} classes")


def _written(
    source: Source, prepared: Prepared, part: tuple[str, int, int], folder: Path, split: str
) -> Iterator[tuple[str, int]]:
    """Write the images of a slice that are not there yet; path and label of each."""
    name, start, stop = part
    for number, example in enumerate(prepared.split(name).read(start, stop)):
        where = f"{prepared.folder}: {name} {start + number}"
        try:
            data, label = example["image"][0], source.label(example)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(f"{where}: no image or label of {source.task} in it: {error!r}") from None
        if not 0 <= label < source.classes:
            raise DataError(f"{where}: label {label} is out of range: {source.task} has {source.classes} classes")
        data, ending = _encoded(data, source.scale, where)
        relative = f"images/{split}/{number:06d}{ending}"
        if not (folder / relative).is_file():
            write_file(folder / relative, lambda path, data=data: _save(data, path))
        yield relative, label


def _encoded(data: bytes, scale: int, where: str) -> tuple[bytes, str]:
    """An image file's bytes and ending: those stored, unless its pixels are scaled or its format is unusual."""
    ending = next((ending for magic, ending in _MAGIC.items() if data.startswith(magic)), None)
    if ending is not None and scale == 1:
        return data, ending
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image)
    # Pillow's decoders raise many kinds of errors on bytes that are not an image.
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DataError(f"{where}: cannot be read as an image: {error}") from error
    buffer = io.BytesIO()
    Image.fromarray((pixels.astype(np.int64) * scale).clip(0, 255).astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue(), ".png"


def _save(data: bytes, path: Path) -> None:
    path.write_bytes(data)


if __name__ == "__main__":
    from bench.made.__main__ import main

    sys.exit(main(["tfds", *sys.argv[1:]]))
