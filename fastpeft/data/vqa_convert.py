"""VQAv2's own files as the list that `read_vqa` reads.

    python -m fastpeft.data.vqa_convert v2_OpenEnded_mscoco_train2014_questions.json \\
        v2_mscoco_train2014_annotations.json --images train2014/COCO_train2014_{image_id:012d}.jpg --out vqa_train.json

The annotations may be left out for a test, whose answers nobody has. Every question has the answers of all its
annotators but blank ones, in their order, as its weights are the shares of annotators who gave them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fastpeft._serve import serve
from fastpeft.data.entries import Entry, entries, read_json
from fastpeft.data.errors import DataError

_FORM = "train2014/COCO_train2014_{image_id:012d}.jpg"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 2 for files that cannot be joined."""
    parser = argparse.ArgumentParser(
        prog="python -m fastpeft.data.vqa_convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("questions", metavar="QUESTIONS", help="the challenge's questions")
    parser.add_argument("annotations", metavar="ANNOTATIONS", nargs="?", help="their annotations; none for a test")
    parser.add_argument("--images", required=True, metavar="FORM", help=f"an image's path below data.root: {_FORM}")
    parser.add_argument("--out", required=True, metavar="FILE", help="the list, replaced if it is there")
    options = parser.parse_args(arguments)
    return serve(lambda: _serve(options))


def _serve(options: argparse.Namespace) -> None:
    from fastpeft.metrics.result_files import write_json

    found = convert(options.questions, options.annotations, options.images)
    write_json(options.out, found)
    print(f"{len(found):,} questions: {options.out}")


def convert(questions: str | Path, annotations: str | Path | None, images: str) -> list[dict[str, Any]]:
    """The questions as `read_vqa` takes them, in the order of their file.

    Args:
        questions: The challenge's file, `{"questions": [{"question_id", "image_id", "question"}]}`.
        annotations: `{"annotations": [{"question_id", "answers": [{"answer"}]}]}`; None for questions without answers.
        images: An image's path below the root, with `{image_id}` in it.

    Raises:
        DataError: A file is missing or malformed, or they are not about the same questions.
    """
    _path(images, 1)
    answers = None if annotations is None else _answers(annotations)
    found, seen = [], set()
    for entry in _entries(questions, "questions"):
        number = entry.whole("question_id")
        if number in seen:
            raise DataError(f"{entry.where}: question_id {number} was there before")
        seen.add(number)
        image, text = _path(images, entry.whole("image_id")), entry.text("question")
        found.append({"dataset": "vqa", "image": image, "question": text, "question_id": number})
        if answers is not None:
            if number not in answers:
                raise DataError(f"{entry.where}: question_id {number} has no annotation in {annotations}")
            found[-1]["answer"] = answers[number]
    if not found:
        raise DataError(f"{questions}: no questions in it")
    further = (answers or {}).keys() - seen
    if further:
        raise DataError(f"{annotations}: question_id {min(further)} is not among the questions of {questions}")
    return found


def _answers(path: str | Path) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for entry in _entries(path, "annotations"):
        number = entry.whole("question_id")
        if number in found:
            raise DataError(f"{entry.where}: question_id {number} was there before")
        given = [answer.get("answer", str, "a text") for answer in entry.objects("answers")]
        # Whoever left the field empty has said nothing that could be trained on.
        found[number] = [answer for answer in given if answer.strip()]
        if not found[number]:
            entry.fail("answers", "one that is not blank", "none")
    return found


def _entries(path: str | Path, field: str) -> list[Entry]:
    values = read_json(path)
    if not isinstance(values, dict) or field not in values:
        raise DataError(f"{path}: expected the challenge's file, an object with the field '{field}'")
    return list(entries(path, values[field], f"a list of {field}"))


def _path(form: str, image_id: int) -> str:
    try:
        path = form.format(image_id=image_id)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise DataError(f"--images: '{form}' cannot be filled in ({error}); give one such as {_FORM}") from None
    if path == form.format(image_id=image_id + 1):
        raise DataError(f"--images: '{form}' is the same for every image; give one such as {_FORM}")
    return path


if __name__ == "__main__":
    sys.exit(main())
