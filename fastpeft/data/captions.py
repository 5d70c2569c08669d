"""Captions in the JSON of Karpathy's split of COCO, a list of images with their sentences.

Either the list itself, one file a split, or the original `dataset_coco.json`, `{"images": [...]}` with a `split` for
each image. An image lies at `<root>/<folder>/<filename>`, where COCO's `train2014` and `val2014` are in folders
`train2014_img` and `val2014_img`, or if there is no such folder in `train2014` and `val2014` themselves, and any other
`filepath` is a folder of its own name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fastpeft.data.entries import Entry, entries, read_json
from fastpeft.data.errors import DataError
from fastpeft.data.presence import Presence

# `train` with `restval` are the 113 thousand images that Karpathy's split is trained on.
SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}
_FOLDERS = {"train2014": "train2014_img", "val2014": "val2014_img"}
_COCO_NAME = re.compile(r"_(\d{12})\.\w+$")


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """An image and what people say about it.

    Attributes:
        path: The file.
        name: Its name, which is the id in result files.
        image_id: COCO's number, where there is one, else the name.
        sentences: Captions in lower case, otherwise as they are.
    """

    path: Path
    name: str
    image_id: int | str
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Captions:
    """A split. Training takes a sample from each sentence, evaluation one from each image.

    Attributes:
        images: In the order of the file.
    """

    images: list[CaptionedImage]

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """Numbers of image and sentence, of all sentences."""
        return [(i, j) for i, image in enumerate(self.images) for j in range(len(image.sentences))]

    def references(self) -> dict[str, tuple[str, ...]]:
        """The sentences by the image's name, as scoring takes them.

        Raises:
            DataError: Two images have one name.
        """
        found: dict[str, tuple[str, ...]] = {}
        for image in self.images:
            if image.name in found:
                raise DataError(f"{image.path}: another image has the same name, which is its id in result files")
            found[image.name] = image.sentences
        return found


def read_captions(path: str | Path, root: str | Path, split: str | None = None) -> Captions:
    """Read a split's images and captions; looks that the images are there, and opens none.

    Args:
        path: The JSON file.
        root: Folder with the images' folders.
        split: `train` (with `restval`), `val` or `test`, of a file whose images say which they belong to. None takes
            all of the file's images.

    Raises:
        DataError: Something is missing or malformed; the message names file, entry and field.
    """
    if split is not None and split not in SPLITS:
        raise DataError(f"split: expected one of {', '.join(SPLITS)}, got '{split}'")
    values = read_json(path)
    whole = isinstance(values, dict)
    if whole:
        if "images" not in values:
            raise DataError(f"{path}: expected a list of images, or an object with the field 'images'")
        if split is None:
            raise DataError(f"{path}: holds all splits; say which: {', '.join(SPLITS)}")
        values = values["images"]
    root, presence, images = Path(root), Presence(), []
    for entry in entries(path, values, "a list of images"):
        if split is not None and (whole or "split" in entry):
            if entry.one_of("split", [name for names in SPLITS.values() for name in names]) not in SPLITS[split]:
                continue
        images.append(_image(entry, root, presence))
    if not images:
        raise DataError(f"{path}: no images{f' of split {split!r}' if split else ''} in it")
    presence.check()
    return Captions(images)


def _image(entry: Entry, root: Path, presence: Presence) -> CaptionedImage:
    name, folder = entry.text("filename"), entry.text("filepath")
    folders = (_FOLDERS[folder], folder) if folder in _FOLDERS else (folder,)
    there = [own for own in folders if presence.has(root / own)]
    where = f"{entry.where}: filename"
    if not there and len(folders) > 1:
        where += f", in neither {folders[0]} nor {folders[1]}"
    path = presence.ask(root, f"{(there or folders)[0]}/{name}", where)
    sentences = tuple(sentence.text("raw").lower() for sentence in entry.objects("sentences"))
    return CaptionedImage(path, name, _image_id(entry, name), sentences)


def _image_id(entry: Entry, name: str) -> int | str:
    numbered = _COCO_NAME.search(name)
    for field in ("cocoid", "image_id"):
        if field in entry:
            return entry.whole(field)
    # Not imgid, which counts the images of a list: in a submission it would be another image's number.
    return int(numbered[1]) if numbered else name
