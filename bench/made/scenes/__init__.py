"""Scenes of simple things, with captions in COCO's format and questions with ten answers in VQAv2's."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from bench.made.lists import claim, write_file
from bench.made.scenes.annotators import answers
from bench.made.scenes.captions import captions as sentences_of
from bench.made.scenes.files import (
    MOST_IMAGES,
    Picture,
    Question,
    answer_list,
    place,
    write_object,
    write_rows,
    write_split,
)
from bench.made.scenes.floors import floors
from bench.made.scenes.picture import render
from bench.made.scenes.questions import FAMILIES, Questioner
from bench.made.scenes.scene import COLORS, SHAPES, Scene, held_out_pairs
from bench.made.scenes.splits import SPLITS, draw_splits
from fastpeft.data import DataError
from fastpeft.trainer.report import Reporter

# Goes up when other pixels or words come out.
_VERSION = 1
_CHUNK = 64
_MOST_PAIRS = len(SHAPES) * len(COLORS) // 2


def make(
    out: Path,
    *,
    train: int = 6000,
    val: int = 500,
    test: int = 500,
    captions: int = 5,
    questions: int = 5,
    size: int = 112,
    held_out: int = 11,
    novel: float = 0.5,
    seed: int = 0,
    workers: int = 1,
) -> None:
    """Scenes of simple things with captions (COCO format) and questions with ten answers (VQAv2 format).

    What comes out depends on the options, not on the workers and the interruptions.

    Args:
        out: folder that gets images/, captions_*.json, vqa_*.json and scenes.json.
        train: training images.
        val: validation images.
        test: test images.
        captions: sentences an image.
        questions: questions an image.
        size: of the square images, in pixels.
        held_out: pairs of a shape and a color that only test images have.
        novel: share of the test images with such a pair.
        seed: of scenes, words and answers.
        workers: processes that draw.
    """
    settings = {
        "train": train, "val": val, "test": test, "captions": captions, "questions": questions, "size": size,
        "held_out": held_out, "novel": novel, "seed": seed,
    }  # fmt: skip
    _check(settings, workers)
    claim(out, {"maker": "scenes", "version": _VERSION} | settings)
    sizes, pairs = {split: settings[split] for split in SPLITS}, held_out_pairs(seed, held_out)
    drawn = draw_splits(seed, sizes, pairs, novel)
    report = Reporter(True)
    _draw_all(out, drawn, size, workers, report)
    pictures = {
        split: _spoken_of(split, scenes, seed, captions, questions, () if split == "test" else pairs)
        for split, scenes in drawn.items()
    }
    for split in SPLITS:
        write_split(out, split, pictures[split])
    write_rows(out / "answer_list.json", answer_list(picture for split in SPLITS for picture in pictures[split]))
    # Written last: where it is, everything is.
    write_object(out / "scenes.json", _summary(settings, pairs, pictures))
    report.say(f"{out}: {train} training, {val} validation and {test} test images at {size} px")


def _check(settings: dict[str, Any], workers: int) -> None:
    """Refuse options that make no data set."""
    whole = {
        "train": (1, MOST_IMAGES), "val": (1, MOST_IMAGES), "test": (1, MOST_IMAGES), "captions": (1, 20),
        "questions": (1, 20), "size": (32, 1024), "held_out": (0, _MOST_PAIRS), "seed": (0, None),
    }  # fmt: skip
    for name, (least, most) in {**whole, "novel": (0, 1), "workers": (1, None)}.items():
        value = workers if name == "workers" else settings[name]
        # Written so that "not a number" is refused too.
        if not (value >= least and (most is None or value <= most)):
            limits = f"at least {least}" if most is None else f"from {least} to {most}"
            raise DataError(f"scenes: --{name.replace('_', '-')} must be {limits}, got {value}")
    if settings["novel"] > 0 and not settings["held_out"]:
        raise DataError("scenes: without held-out pairs no test image can have one: give --novel 0, or --held-out")


def _draw_all(out: Path, drawn: dict[str, list[Scene]], size: int, workers: int, report: Reporter) -> None:
    """Write the pictures that are not there."""
    jobs = []
    for split in SPLITS:
        folder = out / place(split)
        folder.mkdir(parents=True, exist_ok=True)
        there = set(os.listdir(folder))
        missing = [
            (folder / name, scene)
            for number, scene in enumerate(drawn[split])
            if (name := Picture(split, number, scene, [], []).file) not in there
        ]
        jobs += [(missing[start : start + _CHUNK], size) for start in range(0, len(missing), _CHUNK)]
    with report.bar("images", sum(len(job[0]) for job in jobs)) as advance:
        if workers == 1 or len(jobs) < 2:
            for job in jobs:
                advance(_draw_some(job))
            return
        with ProcessPoolExecutor(workers) as pool:
            for count in pool.map(_draw_some, jobs):
                advance(count)


def _draw_some(job: tuple[Sequence[tuple[Path, Scene]], int]) -> int:
    from PIL import Image

    places, size = job
    for path, scene in places:
        image = Image.fromarray(render(scene, size))
        write_file(path, lambda part, image=image: image.save(part, format="PNG"))
    return len(places)


def _spoken_of(
    split: str, scenes: Sequence[Scene], seed: int, captions: int, questions: int, unspoken: Sequence[tuple[str, str]]
) -> list[Picture]:
    """Captions, questions and answers of a split.

    Args:
        split: its name.
        scenes: in order.
        seed: of the words.
        captions: a scene.
        questions: a scene.
        unspoken: pairs of shape and color that are not in the pictures and that no question names.
    """
    questioner = Questioner(unspoken)
    pictures = []
    for number, scene in enumerate(scenes):
        rng = random.Random(f"words {seed} {split} {number}")
        said = sentences_of(rng, scene, captions)
        asked = [
            Question(one.family, one.text, one.answer, answers(rng, one.answer))
            for one in questioner.ask(rng, scene, questions)
        ]
        pictures.append(Picture(split, number, scene, said, asked))
    return pictures


def _summary(
    settings: dict[str, Any], pairs: Sequence[tuple[str, str]], pictures: dict[str, list[Picture]]
) -> dict[str, Any]:
    """What was made and what can be had without looking."""
    counts = {
        split: {
            "images": len(found),
            "novel": sum(picture.scene.novel for picture in found),
            "captions": sum(len(picture.captions) for picture in found),
            "questions": sum(len(picture.questions) for picture in found),
        }
        for split, found in pictures.items()
    }
    answered = {family: Counter[str]() for family in FAMILIES}
    for question in (question for picture in pictures["train"] for question in picture.questions):
        answered[question.family][question.answer] += 1
    return {
        "maker": "scenes",
        "version": _VERSION,
        "settings": settings,
        "held_out": [{"shape": shape, "color": color} for shape, color in pairs],
        "splits": {split: counts[split] for split in SPLITS},
        "train_answers": {family: dict(sorted(found.items())) for family, found in answered.items()},
        "floors": {split: floors(pictures["train"], pictures[split]) for split in ("val", "test")},
    }
