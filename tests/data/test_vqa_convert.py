"""VQAv2's own files joined to the list that is read."""

from __future__ import annotations

import json

import pytest

from fastpeft.data import DataError
from fastpeft.data.vqa import read_vqa
from fastpeft.data.vqa_convert import main
from tests.data.files import write_image
from tests.data.vl_files import write_json

FORM = "val2014/COCO_val2014_{image_id:012d}.png"


def official(tmp_path):
    """Objects of both files, about two images."""
    questions = [
        {"image_id": 9, "question": "Is it red?", "question_id": 90},
        {"image_id": 7, "question": "How many?", "question_id": 70},
    ]
    annotations = [
        {"question_id": 70, "image_id": 7, "answers": [{"answer_id": n, "answer": "2"} for n in range(10)]},
        {"question_id": 90, "image_id": 9, "answers": [{"answer": text} for text in ["yes"] * 7 + ["no"] * 3]},
    ]
    for number in (7, 9):
        write_image(tmp_path / FORM.format(image_id=number))
    return questions, annotations


def convert(tmp_path, questions, annotations, form=FORM):
    files = [str(write_json(tmp_path / "questions.json", {"questions": questions}))]
    if annotations is not None:
        files.append(str(write_json(tmp_path / "annotations.json", {"annotations": annotations})))
    return main([*files, "--images", form, "--out", str(tmp_path / "out" / "vqa.json")])


def test_the_list_is_read_with_the_answers_of_all_annotators(tmp_path):
    assert convert(tmp_path, *official(tmp_path)) == 0
    found = read_vqa(tmp_path / "out" / "vqa.json", tmp_path, training=True)
    assert [question.question_id for question in found.questions] == [90, 70]
    assert found.questions[0].answers == ("yes", "no") and found.questions[0].weights == pytest.approx((0.7, 0.3))
    assert found.questions[1].answers == ("2",) and found.questions[1].given == (10,)
    assert [path.name for path in found.images] == ["COCO_val2014_000000000009.png", "COCO_val2014_000000000007.png"]


def test_blank_answers_are_left_out(tmp_path):
    questions, annotations = official(tmp_path)
    annotations[1]["answers"][9]["answer"] = ""
    assert convert(tmp_path, questions, annotations) == 0
    assert json.loads((tmp_path / "out" / "vqa.json").read_text())[0]["answer"] == ["yes"] * 7 + ["no"] * 2


def test_a_test_has_no_answers(tmp_path):
    questions, _ = official(tmp_path)
    assert convert(tmp_path, questions, None) == 0
    assert all("answer" not in entry for entry in json.loads((tmp_path / "out" / "vqa.json").read_text()))


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda q, a: a.pop(), "questions.json: entry 0: question_id 90 has no annotation in "),
        (lambda q, a: q.pop(), "annotations.json: question_id 70 is not among the questions of "),
        (lambda q, a: q.append(q[0]), "questions.json: entry 2: question_id 90 was there before"),
        (lambda q, a: a.append(a[0]), "annotations.json: entry 2: question_id 70 was there before"),
        (lambda q, a: q[1].pop("image_id"), "questions.json: entry 1: has no field 'image_id'"),
        (lambda q, a: a[0].update(answers=[]), "annotations.json: entry 0: answers: expected a list of objects"),
        (lambda q, a: [x.update(answer=" ") for x in a[0]["answers"]], "entry 0: answers: expected one that is not"),
        (lambda q, a: (q.clear(), a.clear()), "questions.json: no questions in it"),
    ],
)
def test_files_that_cannot_be_joined_get_a_line(tmp_path, capsys, change, expected):
    given = official(tmp_path)
    change(*given)
    assert convert(tmp_path, *given) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["val2014/image.jpg", "{image}.jpg", "{image_id:x", "{}.jpg", "{image_id.a}"])
def test_a_form_that_names_no_image(tmp_path, capsys, form):
    assert convert(tmp_path, *official(tmp_path), form=form) == 2
    said = capsys.readouterr().err
    assert "--images: '" in said and "give one such as" in said and said.count("\n") == 1


def test_the_files_are_told_apart(tmp_path, capsys):
    questions, annotations = official(tmp_path)
    first = write_json(tmp_path / "a.json", {"annotations": annotations})
    second = write_json(tmp_path / "q.json", {"questions": questions})
    assert main([str(first), str(second), "--images", FORM, "--out", str(tmp_path / "x.json")]) == 2
    assert "expected the challenge's file, an object with the field 'annotations'" in capsys.readouterr().err
    for path in (first, second):
        with pytest.raises(
            DataError, match=r"one of VQAv2's own files.*python -m fastpeft\.data\.vqa_convert QUESTIONS"
        ):
            read_vqa(path, tmp_path, training=True)
