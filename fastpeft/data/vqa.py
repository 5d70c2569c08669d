"""Questions about images, with what several people answered: the JSON lists that mPLUG reads.

    {"dataset": "vqa", "image": "val2014/....jpg", "question": "...", "question_id": 1, "answer": ["yes", ...]}

`dataset` (vqa, vg or gqa) says in which folder the image lies. `answer` is a list, one from each annotator, for vqa and
a single text for vg and gqa. Objects may have `ocr`, a list of [position, token], and `object_label`, "a&&b".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastpeft.data.entries import Entry, entries, kind_of, read_json
from fastpeft.data.errors import DataError
from fastpeft.data.presence import Presence

DATASETS = ("vqa", "vg", "gqa")
# What surrounds a question on its way into the text encoder.
TEMPLATES = {"original": "{question}", "study": "Question: {question} Answer: "}
# Visual Genome and GQA have one answer each, of one annotator.
_SINGLE_WEIGHT = 0.5
_OCR_WORDS = 30
_SEPARATOR = " [SEP] "
_DELETED, _SPACED = re.compile(r"[,.'!?\"()*#:;~]"), re.compile(r"[-/]")


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one image.

    Attributes:
        image: Number of its image.
        text: The question as the file has it.
        more: What the OCR and object switches add behind it, with its separators.
        question_id: None if the file has none, which only training may lack.
        answers: Each distinct answer once, in the order of the file; none if the file has none.
        weights: Of each answer: the share of annotators who gave it; 0.5 for vg and gqa.
        given: How often each answer was given.
    """

    image: int
    text: str
    more: str
    question_id: int | None
    answers: tuple[str, ...]
    weights: tuple[float, ...]
    given: tuple[int, ...]


@dataclass(frozen=True)
class Questions:
    """The questions of one or several files, and the images that they are about, each image once.

    Attributes:
        images: Their files.
        questions: In the order of the files.
        files: Each file and the number of its first question.
    """

    images: list[Path]
    questions: list[Question]
    files: tuple[tuple[str, int], ...] = ()

    def where(self, number: int) -> str:
        """Where a question stands, for messages: file, entry and id."""
        question = self.questions[number]
        named = f"'{question.text}'" if question.question_id is None else f"question_id {question.question_id}"
        for file, first in reversed(self.files):
            if number >= first:
                return f"{file}: entry {number - first} ({named})"
        return f"question {named}"


def read_vqa(
    files: str | Path | Sequence[str | Path],
    roots: str | Path | Mapping[str, str | Path],
    *,
    training: bool,
    ocr: bool = False,
    objects: bool = False,
) -> Questions:
    """Read questions; looks that the images are there, and opens none.

    Args:
        files: One JSON file or several, one behind the other.
        roots: Folder of the images for each `dataset` that occurs, or one for all of them.
        training: Whether answers are needed, and question ids are not; for evaluation it is the other way round.
        ocr: Whether the words read in the image follow the question.
        objects: Whether the names of things seen in it follow.

    Raises:
        DataError: Something is missing or malformed; the message names file, entry and field.
    """
    files = [files] if isinstance(files, (str, Path)) else list(files)
    if isinstance(roots, Mapping):
        roots = {name: Path(root) for name, root in roots.items()}
    else:
        roots = dict.fromkeys(DATASETS, Path(roots))
    presence, numbers = Presence(), _Numbers()
    seen: dict[int, str] = {}
    # Answers recur: of five million that VQAv2's annotators gave in training, hardly a hundredth are distinct.
    known: dict[str, str] = {}
    questions, firsts = [], []
    for file in files:
        firsts.append((str(file), len(questions)))
        for entry in _listed(file):
            image = numbers.of(presence.ask(_root(entry, roots), entry.text("image"), f"{entry.where}: image"))
            text, question_id = entry.text("question"), _question_id(entry, training, seen)
            more = (_ocr(entry) if ocr else "") + (_objects(entry) if objects else "")
            answers = _answers(entry) if training or "answer" in entry else ((), (), ())
            answers = (tuple(known.setdefault(answer, answer) for answer in answers[0]), *answers[1:])
            questions.append(Question(image, text, more, question_id, *answers))
    if not questions:
        raise DataError(f"{', '.join(map(str, files)) or 'VQA'}: no questions in it")
    presence.check()
    return Questions(numbers.paths, questions, tuple(firsts))


def clean_ocr(words: str) -> str:
    """Words read in an image, as they follow a question: lower case, little punctuation, thirty words at most."""
    return " ".join(_SPACED.sub(" ", _DELETED.sub("", words.lower())).split()[:_OCR_WORDS])


def _listed(file: str | Path) -> Iterator[Entry]:
    values = read_json(file)
    if isinstance(values, dict) and ("questions" in values or "annotations" in values):
        raise DataError(
            f"{file}: expected a list of questions, got one of VQAv2's own files; python -m fastpeft.data.vqa_convert "
            "QUESTIONS ANNOTATIONS --images FORM --out FILE makes the list of them"
        )
    return entries(file, values, "a list of questions")


class _Numbers:
    """Numbers the distinct paths in the order in which they come."""

    def __init__(self) -> None:
        self._of: dict[Path, int] = {}

    def of(self, path: Path) -> int:
        return self._of.setdefault(path, len(self._of))

    @property
    def paths(self) -> list[Path]:
        return list(self._of)


def _root(entry: Entry, roots: Mapping[str, Path]) -> Path:
    dataset = entry.one_of("dataset", DATASETS)
    if dataset not in roots:
        raise DataError(
            f"{entry.where}: dataset: no folder was given for the images of '{dataset}', only for "
            f"{', '.join(roots) or 'none'}"
        )
    return roots[dataset]


def _question_id(entry: Entry, training: bool, seen: dict[int, str]) -> int | None:
    if training:
        return entry.whole("question_id") if "question_id" in entry else None
    number = entry.whole("question_id")
    if number in seen:
        raise DataError(f"{entry.where}: question_id {number} was there before, at {seen[number]}")
    seen[number] = entry.where
    return number


def _answers(entry: Entry) -> tuple[tuple[str, ...], tuple[float, ...], tuple[int, ...]]:
    """Distinct answers, their weights, and how often each was given."""
    if entry.values["dataset"] != "vqa":
        return (entry.text("answer"),), (_SINGLE_WEIGHT,), (1,)
    counts = Counter(entry.texts("answer"))
    return tuple(counts), tuple(count / counts.total() for count in counts.values()), tuple(counts.values())


def _ocr(entry: Entry) -> str:
    if "ocr" not in entry:
        return ""
    tokens = []
    for number, pair in enumerate(entry.get("ocr", list, "a list of [position, token]")):
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[1], str):
            entry.fail(f"ocr[{number}]", "[position, token]", kind_of(pair))
        tokens.append(pair[1])
    words = clean_ocr(" ".join(tokens))
    return _SEPARATOR + words if words else ""


def _objects(entry: Entry) -> str:
    if "object_label" not in entry:
        return ""
    names = [name for name in entry.get("object_label", str, "a text, 'a&&b'").split("&&") if name.strip()]
    return _SEPARATOR + " ".join(names) if names else ""
