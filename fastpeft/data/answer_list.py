"""The answers that a model chooses from: a JSON list of texts, mPLUG's `answer_list.json`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from fastpeft.data.entries import kind_of, read_json
from fastpeft.data.errors import DataError
from fastpeft.data.vqa import Questions


def read_answer_list(path: str | Path) -> list[str]:
    """The answers of a file, in its order.

    Raises:
        DataError: It is missing, not a list of texts, empty, or has an answer twice; the message names file and entry.
    """
    answers = read_json(path)
    if not isinstance(answers, list):
        raise DataError(f"{path}: expected a list of answers, got {kind_of(answers)}")
    if not answers:
        raise DataError(f"{path}: expected a list of answers, got an empty one")
    seen: dict[str, int] = {}
    for number, answer in enumerate(answers):
        if not isinstance(answer, str) or not answer.strip():
            got = kind_of(answer) if not isinstance(answer, str) else "a blank one"
            raise DataError(f"{path}: entry {number}: expected a text, got {got}")
        before = seen.setdefault(_read(answer), number)
        if before != number:
            raise DataError(f"{path}: entry {number}: '{answer}' was there before, at entry {before}")
    return answers


def check_answers(
    path: str | Path, answers: Sequence[str], questions: Questions, numbers: Iterable[int], *, training: bool
) -> None:
    """Look that a list has the answers that it must have.

    In training these are all: what is trained on and can never be chosen is lost. In evaluation it is the answer that
    most annotators gave, or one of these; a question that was read without answers needs none.

    Args:
        path: Of the list, for messages.
        answers: The list.
        questions: What is asked.
        numbers: Which of the questions.
        training: Whether these are trained on.

    Raises:
        DataError: An answer is not in the list; the message names it, its question and the list.
    """
    known = {_read(answer) for answer in answers}
    lacking: dict[str, int] = {}
    for number in numbers:
        question = questions.questions[number]
        if training:
            needed = [answer for answer in question.answers if _read(answer) not in known]
        else:
            most = max(question.given, default=0)
            best = [answer for answer, times in zip(question.answers, question.given, strict=True) if times == most]
            needed = best[:1] if not known.intersection(map(_read, best)) else []
        for answer in needed:
            lacking.setdefault(answer, number)
    if lacking:
        answer, number = next(iter(lacking.items()))
        what = "an answer" if training else "the answer that most annotators gave"
        more = f", and {len(lacking) - 1:,} more" if len(lacking) > 1 else ""
        raise DataError(f"{path}: lacks '{answer}', {what} of {questions.where(number)}{more}")


def _read(answer: str) -> str:
    """An answer as a tokenizer without capitals reads it."""
    return " ".join(answer.lower().split())
