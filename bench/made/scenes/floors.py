"""Accuracies that are had without looking at a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import Any

from bench.made.scenes.annotators import accuracy
from bench.made.scenes.files import Picture, Question
from bench.made.scenes.questions import FAMILIES


def floors(train: Sequence[Picture], pictures: Sequence[Picture]) -> dict[str, dict[str, Any]]:
    """What can be scored without looking: official accuracies in percent, by family and overall.

    Args:
        train: where the answers are counted that are then given.
        pictures: whose questions are answered.

    Returns:
        For each family, and "all": `questions`, how many; `most_frequent`, by always giving the family's most frequent
        answer, which is `answer`; `blind`, by giving the most frequent answer to the very same question, or the
        family's where it has not been asked, and of two that a question names the first. For "all" `one_answer` too, by
        giving its `answer` to every question.
    """
    by_family: dict[str, Counter[str]] = {family: Counter() for family in FAMILIES}
    by_text: dict[str, Counter[str]] = {}
    for question in _questions(train):
        by_family[question.family][question.answer] += 1
        by_text.setdefault(question.text, Counter())[question.answer] += 1
    usual = {family: _first(counted) for family, counted in by_family.items()}
    overall = _first(sum(by_family.values(), Counter()))

    def blind(question: Question) -> str:
        if question.family == "which":
            named = (word for word in question.text.rstrip("?").split() if word in by_family["which"])
            return next(named, usual["which"])
        return _first(by_text[question.text]) if question.text in by_text else usual[question.family]

    found: dict[str, dict[str, Any]] = {}
    for name in (*FAMILIES, "all"):
        asked = [question for question in _questions(pictures) if name in (question.family, "all")]
        ways: dict[str, Callable[[Question], str]] = {"most_frequent": lambda one: usual[one.family], "blind": blind}
        if name == "all":
            ways["one_answer"] = lambda one: overall
        scores = {
            way: round(100 * fmean(accuracy(answer(one), one.given) for one in asked), 2) if asked else None
            for way, answer in ways.items()
        }
        found[name] = {"questions": len(asked), **scores, "answer": usual.get(name, overall)}
    return found


def _questions(pictures: Sequence[Picture]) -> Iterator[Question]:
    return (question for picture in pictures for question in picture.questions)


def _first(counted: Counter[str]) -> str:
    """The most frequent; of those that are as frequent the first in the alphabet."""
    return min(counted, key=lambda answer: (-counted[answer], answer)) if counted else ""
