"""The files of a made data set: captions as in Karpathy's COCO json, questions as mPLUG and as VQAv2 have them.

Paths are relative to the data set's folder. Ids are numbers, as COCO's: those of questions tell the image.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.made.lists import write_file
from bench.made.scenes.questions import ANSWER_TYPES
from bench.made.scenes.scene import Scene
from bench.made.scenes.splits import SPLITS

# Of images in a split, and of questions about an image.
MOST_IMAGES, MOST_QUESTIONS = 1_000_000, 100


@dataclass(frozen=True)
class Question:
    """A question with ten people's answers."""

    family: str
    text: str
    answer: str
    given: list[str]


@dataclass(frozen=True)
class Picture:
    """A picture of a split and what is said and asked about it."""

    split: str
    number: int
    scene: Scene
    captions: list[str]
    questions: list[Question]

    @property
    def id(self) -> int:
        """Different from every other picture's."""
        return (1 + SPLITS.index(self.split)) * MOST_IMAGES + self.number

    @property
    def file(self) -> str:
        """Name of its file, which no other split has."""
        return f"{self.split}_{self.number:06d}.png"

    def question_id(self, place: int) -> int:
        """Of the question at this place of its list."""
        return self.id * MOST_QUESTIONS + place


def place(split: str) -> str:
    """Folder of a split's pictures."""
    return f"images/{split}"


def write_split(folder: Path, split: str, pictures: Sequence[Picture]) -> None:
    """Write a split's captions, questions and scenes, and for val and test the official VQA files."""
    write_rows(folder / f"captions_{split}.json", map(_caption, pictures))
    write_rows(folder / f"vqa_{split}.json", (row for picture in pictures for row in _asked(picture)))
    described = [{"image": picture.file, "image_id": picture.id} | picture.scene.described() for picture in pictures]
    _write(folder / "scenes" / f"{split}.jsonl", "".join(f"{json.dumps(row)}\n" for row in described))
    if split != "train":
        head = {"info": {"description": "scenes"}, "data_type": "scenes", "data_subtype": split, "license": {}}
        questions = [row for picture in pictures for row in _official_questions(picture)]
        annotations = [row for picture in pictures for row in _official_annotations(picture)]
        write_object(folder / f"questions_{split}.json", head | {"task_type": "Open-Ended", "questions": questions})
        write_object(folder / f"annotations_{split}.json", head | {"annotations": annotations})


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """A json list, one entry a line."""
    _write(path, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def write_object(path: Path, content: dict[str, Any]) -> None:
    """A json object; a list of objects in it one entry a line."""
    parts = []
    for key, value in content.items():
        rows = isinstance(value, list) and value and isinstance(value[0], dict)
        text = "[\n" + ",\n".join(map(json.dumps, value)) + "\n]" if rows else json.dumps(value)
        parts.append(f"{json.dumps(key)}: {text}")
    _write(path, "{\n" + ",\n".join(parts) + "\n}\n")


def answer_list(pictures: Iterable[Picture]) -> list[str]:
    """Every answer that anyone has given, the most frequent first."""
    counted = Counter(answer for picture in pictures for question in picture.questions for answer in question.given)
    return sorted(counted, key=lambda answer: (-counted[answer], answer))


def _caption(picture: Picture) -> dict[str, Any]:
    sentences = [
        {"raw": raw, "imgid": picture.id, "sentid": picture.question_id(count)}
        for count, raw in enumerate(picture.captions)
    ]
    return {
        "filename": picture.file, "filepath": place(picture.split), "imgid": picture.id, "split": picture.split,
        "sentences": sentences,
    }  # fmt: skip


def _asked(picture: Picture) -> Iterable[dict[str, Any]]:
    for count, question in enumerate(picture.questions):
        yield {
            "dataset": "vqa", "image": f"{place(picture.split)}/{picture.file}", "question": question.text,
            "question_id": picture.question_id(count), "answer": question.given,
        }  # fmt: skip


def _official_questions(picture: Picture) -> Iterable[dict[str, Any]]:
    for count, question in enumerate(picture.questions):
        yield {"image_id": picture.id, "question": question.text, "question_id": picture.question_id(count)}


def _official_annotations(picture: Picture) -> Iterable[dict[str, Any]]:
    for count, question in enumerate(picture.questions):
        yield {
            "question_type": question.family, "multiple_choice_answer": question.answer,
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": person}
                for person, answer in enumerate(question.given, start=1)
            ],
            "image_id": picture.id, "answer_type": ANSWER_TYPES[question.family],
            "question_id": picture.question_id(count),
        }  # fmt: skip


def _write(path: Path, text: str) -> None:
    write_file(path, lambda part: part.write_text(text, encoding="utf-8"))
