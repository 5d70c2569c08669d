"""VQA accuracy by the challenge's rule, and the quick one by a table of answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpeft.data.entries import entries, read_json
from fastpeft.data.errors import DataError
from fastpeft.data.vqa import Questions
from fastpeft.metrics.result_files import check_coverage, read_records
from fastpeft.metrics.vqa_text import normalise, strip_punctuation

# Of the annotators other than the one left out, so many have to agree for full marks.
_AGREEING = 3


@dataclass(frozen=True, slots=True)
class Annotation:
    """What annotators answered to one question.

    Attributes:
        answers: One from each, as they are.
        question_type: First words of the question, or None if it is not known.
        answer_type: yes/no, number or other, or None.
    """

    answers: tuple[str, ...]
    question_type: str | None = None
    answer_type: str | None = None


@dataclass(frozen=True)
class VqaScores:
    """Accuracies in percent, not rounded.

    Attributes:
        overall: Mean over questions.
        by_question_type: Means over the questions of each type.
        by_answer_type: Likewise.
        by_question: Of each question id.
    """

    overall: float
    by_question_type: dict[str, float]
    by_answer_type: dict[str, float]
    by_question: dict[int, float]

    def rounded(self) -> dict[str, Any]:
        """The numbers to two decimals, by the names under which the challenge's evaluator reports them."""
        return {
            "overall": round(self.overall, 2),
            "perQuestionType": {name: round(value, 2) for name, value in self.by_question_type.items()},
            "perAnswerType": {name: round(value, 2) for name, value in self.by_answer_type.items()},
        }


def answer_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """How well a prediction agrees with the annotators: a share, the mean over leaving each of them out.

    Of ten annotators, 0, 1, 2, 3 or more agreeing make 0, 0.3, 0.6, 0.9 and 1.
    """
    given = normalise(prediction)
    # Answers on which all agree stay as they are, even if no prediction, which is normalised, can then equal them.
    compared = [strip_punctuation(answer) for answer in answers] if len(set(answers)) > 1 else answers
    matching = [answer == given for answer in compared]
    agreeing = sum(matching)
    return sum(min(1.0, (agreeing - match) / _AGREEING) for match in matching) / len(matching)


def vqa_accuracy(predictions: Mapping[int, str], annotations: Mapping[int, Annotation]) -> VqaScores:
    """Score predictions by question id.

    Raises:
        DataError: The ids are not those of the annotations.
    """
    if not annotations:
        raise DataError("VQA accuracy: no annotated questions")
    check_coverage(predictions, annotations, "VQA predictions", "question_id")
    by_question, by_kind = {}, (defaultdict(list), defaultdict(list))
    for question_id, annotation in annotations.items():
        score = 100 * answer_accuracy(predictions[question_id], annotation.answers)
        by_question[question_id] = score
        for kinds, kind in zip(by_kind, (annotation.question_type, annotation.answer_type), strict=True):
            if kind is not None:
                kinds[kind].append(score)
    means = [{kind: _mean(scores) for kind, scores in sorted(kinds.items())} for kinds in by_kind]
    return VqaScores(_mean(by_question.values()), *means, by_question)


def read_annotations(path: str | Path) -> dict[int, Annotation]:
    """The challenge's annotation file: `{"annotations": [{"question_id", "answers": [{"answer_id", "answer"}]}]}`.

    Raises:
        DataError: It is missing or malformed, or a question is in it twice.
    """
    values = read_json(path)
    if not isinstance(values, dict) or "annotations" not in values:
        raise DataError(f"{path}: expected an object with the field 'annotations'")
    found: dict[int, Annotation] = {}
    for entry in entries(path, values["annotations"], "a list of annotations"):
        question_id, answers, ids = entry.whole("question_id"), [], set()
        if question_id in found:
            raise DataError(f"{entry.where}: question_id {question_id} was there before")
        for answer in entry.objects("answers"):
            answers.append(answer.get("answer", str, "a text"))
            ids.add(answer.whole("answer_id"))
        if len(ids) < len(answers):
            entry.fail("answers", "an answer_id of its own for each", f"{len(ids)} for {len(answers)}")
        kinds = (entry.text(field) if field in entry else None for field in ("question_type", "answer_type"))
        found[question_id] = Annotation(tuple(answers), *kinds)
    return found


def annotations_of(questions: Questions, numbers: Iterable[int] | None = None) -> dict[int, Annotation]:
    """What `vqa_accuracy` needs, of questions that were read with their answers; types are not known.

    Args:
        questions: What was read.
        numbers: Which of them; None for all.

    Raises:
        DataError: A question has no id, no answers, or a single one that is no annotator's; the message names file,
            entry and id.
    """
    found = {}
    for number in range(len(questions.questions)) if numbers is None else numbers:
        question = questions.questions[number]
        if question.question_id is None:
            raise DataError(f"{questions.where(number)}: VQA accuracy needs a question_id")
        if not question.answers:
            raise DataError(f"{questions.where(number)}: has no field 'answer', which VQA accuracy needs")
        if sum(question.given) < 2:
            raise DataError(f"{questions.where(number)}: VQA accuracy needs the answers of several annotators")
        answers = zip(question.answers, question.given, strict=True)
        found[question.question_id] = Annotation(tuple(answer for answer, times in answers for _ in range(times)))
    return found


def annotations_from(path: str | Path, questions: Questions, numbers: Iterable[int]) -> dict[int, Annotation]:
    """Of the challenge's annotation file, what is about some questions.

    Args:
        path: The file.
        questions: What was read.
        numbers: Which of them.

    Raises:
        DataError: The file is missing or malformed, or lacks a question; the message names it.
    """
    known, found = read_annotations(path), {}
    for number in numbers:
        question_id = questions.questions[number].question_id
        if question_id not in known:
            raise DataError(f"{path}: has no annotation of {questions.where(number)}")
        found[question_id] = known[question_id]
    return found


def quick_accuracy(
    predictions: Mapping[int, str], labels: Mapping[int, Mapping[str, float]], *, exact: bool = False
) -> float:
    """Mean over questions of the score that a table gives the predicted answer, 0 if it is not in it; in percent.

    Args:
        predictions: Answers by question id.
        labels: For each question id the score of each answer.
        exact: Compare texts as they are, as the original does: "t - shirt" is then not "t-shirt". Otherwise both are
            normalised first, and of answers that become one the best score counts.

    Raises:
        DataError: The ids are not those of the labels.
    """
    if not labels:
        raise DataError("quick accuracy: no labelled questions")
    check_coverage(predictions, labels, "VQA predictions", "question_id")
    total = 0.0
    for question_id, scores in labels.items():
        prediction = predictions[question_id]
        if exact:
            total += scores.get(prediction, 0.0)
        else:
            given = normalise(prediction)
            total += max((score for answer, score in scores.items() if normalise(answer) == given), default=0.0)
    return 100 * total / len(labels)


def read_labels(path: str | Path) -> dict[int, dict[str, float]]:
    """A label file: a list of `{"question_id": ..., "label": {answer: score}}`.

    Raises:
        DataError: It is missing or malformed.
    """
    found: dict[int, dict[str, float]] = {}
    for entry in entries(path, read_json(path), "a list of labels"):
        question_id = entry.whole("question_id")
        if question_id in found:
            raise DataError(f"{entry.where}: question_id {question_id} was there before")
        label = entry.get("label", dict, "an object {answer: score}")
        for answer, score in label.items():
            if isinstance(score, bool) or not isinstance(score, (int, float)):
                entry.fail(f"label['{answer}']", "a number", repr(score))
        found[question_id] = label
    return found


def vqa_records(predictions: Mapping[int, str]) -> list[dict[str, Any]]:
    """Predictions as the challenge takes them: `[{"question_id": ..., "answer": ...}]`."""
    return [{"question_id": question_id, "answer": answer} for question_id, answer in predictions.items()]


def read_vqa_results(path: str | Path) -> dict[int, str]:
    """Predictions by question id, from a result file.

    Raises:
        DataError: It is missing or malformed, or an id is in it twice.
    """
    records = read_records(path, "question_id", "answer")
    found = {record["question_id"]: record["answer"] for record in records}
    if len(found) < len(records):
        raise DataError(f"{path}: {len(records) - len(found):,} question_ids are there more than once")
    return found


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
