"""The images, captions and questions of the small study: scenes, some of them for pre-training alone."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

from bench.made import scenes
from bench.made.lists import write_file
from bench.mplug_offline import beginnings, plan
from bench.mplug_study.corpora import Corpus
from bench.mplug_study.protocol import CAPTION, VQA

_PRETRAIN, _TUNE, _BEGINNINGS, _LAST_WORDS = "pretrain", "tune", "beginnings", "last_words"


def prepare(folder: Path, workers: int = 1) -> tuple[Corpus, dict[str, Corpus]]:
    """Make what is not there.

    Args:
        folder: of the scenes.
        workers: processes that draw.

    Returns:
        Beginnings of captions to pre-train on, measured by the last words of others, and what is studied, by kind. All
        are measured on the same validation and test images, and no image of one is in the training of another.

    Raises:
        DataError: the folder holds scenes of other options.
    """
    if not (folder / "scenes.json").is_file():
        scenes.make(
            folder,
            train=plan.PRETRAIN_IMAGES + plan.TUNE_IMAGES, val=plan.VAL_IMAGES, test=plan.TEST_IMAGES,
            size=plan.IMAGE_SIZE, workers=workers,
        )  # fmt: skip
    captions = json.loads((folder / "captions_train.json").read_text(encoding="utf-8"))
    before, tuning = captions[: plan.PRETRAIN_IMAGES], captions[plan.PRETRAIN_IMAGES :]
    _write(folder / f"{_BEGINNINGS}_{_PRETRAIN}.json", beginnings.continued(before, plan.PROMPT, plan.PRETRAIN["seed"]))
    for split in ("val", "test"):
        others = json.loads((folder / f"captions_{split}.json").read_text(encoding="utf-8"))
        _write(folder / f"{_LAST_WORDS}_{split}.json", beginnings.last_words(others))
    _write(folder / f"captions_{_TUNE}.json", tuning)
    tuned = {entry["filename"] for entry in tuning}
    questions = json.loads((folder / "vqa_train.json").read_text(encoding="utf-8"))
    _write(folder / f"vqa_{_TUNE}.json", _some(questions, tuned))
    pretrained = {"train": f"{_BEGINNINGS}_{_PRETRAIN}", "val": f"{_LAST_WORDS}_val", "test": f"{_LAST_WORDS}_test"}
    captions = {split: f"captions_{name}" for split, name in (("train", _TUNE), ("val", "val"), ("test", "test"))}
    asked = {split: f"vqa_{name}" for split, name in (("train", _TUNE), ("val", "val"), ("test", "test"))}
    return _corpus("scenes-beginnings", VQA, folder, pretrained), {
        CAPTION: _corpus("scenes-captions", CAPTION, folder, captions),
        VQA: _corpus("scenes-vqa", VQA, folder, asked),
    }


def _some(questions: list[dict], images: set[str]) -> list[dict]:
    """The first questions about each of these images."""
    by_image: dict[str, list[dict]] = {}
    for question in questions:
        by_image.setdefault(Path(question["image"]).name, []).append(question)
    return [
        question
        for name, own in by_image.items()
        if name in images
        for question in islice(own, plan.QUESTIONS_AN_IMAGE)
    ]


def _corpus(name: str, kind: str, folder: Path, files: dict[str, str]) -> Corpus:
    data = {CAPTION: "coco_caption", VQA: "vqa"}[kind]
    places = {split: str(folder / f"{file}.json") for split, file in files.items()}
    return Corpus(name, kind, {"name": data, "root": str(folder), **places})


def _write(path: Path, rows: list[dict]) -> None:
    if not path.is_file():
        write_file(path, lambda part: part.write_text(json.dumps(rows), encoding="utf-8"))
