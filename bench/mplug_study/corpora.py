"""Captions and questions in a folder of data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.mplug_study.protocol import CAPTION, VQA
from bench.tables.errors import TableError

_SPLITS = ("train", "val", "test")
_LAYOUTS = (
    "coco/dataset_coco.json with its image folders, vqa/vqa_{train,val,test}.json, or what "
    "python -m bench.made scenes writes"
)


@dataclass(frozen=True)
class Corpus:
    """Captions or questions with their images.

    Attributes:
        name: in results.
        kind: `CAPTION` or `VQA`.
        fields: of a configuration's section `data`: what it is and where.
    """

    name: str
    kind: str
    fields: Mapping[str, Any]


def find(root: Path) -> dict[str, Corpus]:
    """What a folder has, by kind.

    Args:
        root: of COCO and VQAv2, or of scenes.

    Raises:
        TableError: it has neither captions nor questions, or questions without one of their files.
    """
    if not root.is_dir():
        raise TableError(f"{root}: no such folder; --data is a folder with {_LAYOUTS}")
    if (root / "scenes.json").is_file():
        return {
            CAPTION: _captions("scenes-captions", root, {name: root / f"captions_{name}.json" for name in _SPLITS}),
            VQA: _questions("scenes-vqa", root, root),
        }
    found = {}
    whole = root / "coco" / "dataset_coco.json"
    if whole.is_file():
        found[CAPTION] = _captions("coco", root / "coco", dict.fromkeys(_SPLITS, whole))
    if (root / "vqa" / "vqa_train.json").is_file():
        found[VQA] = _questions("vqav2", root / "vqa", root / "coco")
    if not found:
        raise TableError(f"{root}: neither captions nor questions; expected {_LAYOUTS}")
    return found


def _captions(name: str, images: Path, files: Mapping[str, Path]) -> Corpus:
    _check(files.values())
    places = {split: str(path) for split, path in files.items()}
    return Corpus(name, CAPTION, {"name": "coco_caption", "root": str(images), **places})


def _questions(name: str, folder: Path, images: Path) -> Corpus:
    files = {split: folder / f"vqa_{split}.json" for split in _SPLITS}
    _check(files.values())
    places = {split: str(path) for split, path in files.items()}
    return Corpus(name, VQA, {"name": "vqa", "root": str(images), **places})


def _check(files) -> None:
    for path in files:
        if not path.is_file():
            raise TableError(f"{path}: missing; expected {_LAYOUTS}")
