"""Questions and the weights of their answers; what is wrong is named."""

from __future__ import annotations

import pytest

from fastpeft.data import DataError
from fastpeft.data.vqa import clean_ocr, read_vqa
from tests.data.files import write_image
from tests.data.vl_files import question_entries, write_json


def read(tmp_path, entries, training=True, **fields):
    return read_vqa(write_json(tmp_path / "q.json", entries), tmp_path, training=training, **fields)


def test_answer_weights_are_the_shares_of_annotators(tmp_path):
    questions = read(tmp_path, question_entries(tmp_path)).questions
    assert [question.answers for question in questions] == [("yes", "no"), ("2",), ("a", "b", "c")]
    assert questions[0].weights == pytest.approx((0.7, 0.3)) and questions[1].weights == (1.0,)
    assert questions[2].weights == pytest.approx((0.5, 0.25, 0.25)), "of eight annotators"
    assert questions[0].given == (7, 3)


def test_images_are_numbered_once(tmp_path):
    found = read(tmp_path, question_entries(tmp_path))
    assert [path.name for path in found.images] == ["0.png", "1.png"]
    assert [question.image for question in found.questions] == [0, 1, 0]


def test_several_files_and_roots(tmp_path):
    first = write_json(tmp_path / "a.json", question_entries(tmp_path / "coco"))
    write_image(tmp_path / "genome/x.png")
    further = {"dataset": "vg", "image": "x.png", "question": "Where?", "answer": "on top"}
    second = write_json(tmp_path / "b.json", [further, further | {"dataset": "gqa"}])
    roots = {"vqa": tmp_path / "coco", "vg": tmp_path / "genome", "gqa": str(tmp_path / "genome")}
    found = read_vqa([first, second], roots, training=True)
    assert [question.question_id for question in found.questions] == [7, 8, 9, None, None]
    assert [(q.answers, q.weights) for q in found.questions[3:]] == [(("on top",), (0.5,))] * 2
    with pytest.raises(DataError, match=r"b\.json: entry 1: dataset: no folder was given for the images of 'gqa'"):
        read_vqa([first, second], {"vqa": tmp_path / "coco", "vg": tmp_path / "genome"}, training=True)


def test_evaluation_needs_ids_and_no_answers(tmp_path):
    entries = question_entries(tmp_path)
    del entries[0]["answer"]
    questions = read(tmp_path, entries, training=False).questions
    assert questions[0].answers == () and questions[1].answers == ("2",)
    with pytest.raises(DataError, match="entry 0: has no field 'answer'"):
        read(tmp_path, entries)
    del entries[1]["question_id"]
    with pytest.raises(DataError, match="entry 1: has no field 'question_id', which is a whole number"):
        read(tmp_path, entries, training=False)
    entries[1]["question_id"] = 7
    with pytest.raises(DataError, match=r"entry 1: question_id 7 was there before, at .*entry 0"):
        read(tmp_path, entries, training=False)


def test_ocr_and_objects_follow_the_question(tmp_path):
    entries = question_entries(tmp_path)[:2]
    entries[0] |= {"ocr": [[[0, 0], "STOP,"], [[1, 1], "Main-St."]], "object_label": "car&&stop sign"}
    entries[1] |= {"ocr": [], "object_label": ""}
    plain, both = read(tmp_path, entries), read(tmp_path, entries, ocr=True, objects=True)
    assert [question.more for question in plain.questions] == ["", ""]
    assert [question.more for question in both.questions] == [" [SEP] stop main st [SEP] car stop sign", ""]
    assert read(tmp_path, entries, objects=True).questions[0].more == " [SEP] car stop sign"
    assert both.questions[0].text == "Is it red?", "questions are not cleaned"


def test_cleaning():
    assert clean_ocr("A.B,c'd!e?f\"g(h)i*j#k:l;m~n ") == "abcdefghijklmn"
    assert clean_ocr("either/or x-ray") == "either or x ray"
    assert clean_ocr(" ".join(f"w{i}" for i in range(40))).split() == [f"w{i}" for i in range(30)]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda e: e[1].pop("question"), r"entry 1: has no field 'question', which is a text"),
        (lambda e: e[1].pop("image"), r"entry 1: has no field 'image'"),
        (lambda e: e[1].pop("dataset"), r"entry 1: has no field 'dataset', which is one of vqa, vg, gqa"),
        (lambda e: e[1].update(dataset="coco"), r"entry 1: dataset: expected one of vqa, vg, gqa, got 'coco'"),
        (lambda e: e[1].update(answer=[]), r"entry 1: answer: expected a list of texts, got an empty one"),
        (lambda e: e[1].update(answer="yes"), r"entry 1: answer: expected a list of texts, got \"yes\""),
        (lambda e: e[1].update(answer=["a", 2]), r"entry 1: answer\[1\]: expected a text, got 2"),
        (lambda e: e[1].update(answer=["a", " "]), r"entry 1: answer\[1\]: expected a text, got a blank one"),
        (lambda e: e[1].update(dataset="vg"), r"entry 1: answer: expected a text, got a list of 10"),
        (lambda e: e[1].update(question_id="8"), r"entry 1: question_id: expected a whole number, got \"8\""),
        (lambda e: e[1].update(question_id=True), r"entry 1: question_id: expected a whole number, got true"),
        (lambda e: e[1].update(ocr=["word"]), r"entry 1: ocr\[0\]: expected \[position, token\], got \"word\""),
        (lambda e: e[1].update(object_label=["a"]), r"entry 1: object_label: expected a text, 'a&&b', got a list of 1"),
        (lambda e: e[1].update(image="/x.png"), r"entry 1: image: expected a path inside .*, got '/x\.png'"),
        (
            lambda e: e[1].update(image="val2014/9.png"),
            r"entry 1: image: 'val2014/9\.png': no such file in .*1 of 2 im",
        ),
        (lambda e: e.clear(), r"q\.json: no questions in it"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, change, message):
    entries = question_entries(tmp_path)
    change(entries)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, entries, ocr=True, objects=True)
    assert str(tmp_path / "q.json") in str(caught.value) and "\n" not in str(caught.value)


def test_no_image_is_opened(tmp_path):
    entries = question_entries(tmp_path)
    (tmp_path / "val2014/0.png").write_bytes(b"not an image")
    assert len(read(tmp_path, entries).questions) == 3
