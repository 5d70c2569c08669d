"""VQA accuracy: the challenge's rule on its own cases, and what is wrong with files."""

from __future__ import annotations

import json

import pytest

from fastpeft.data import DataError
from fastpeft.data.vqa import read_vqa
from fastpeft.metrics.result_files import merge_ranks, rank_file, read_records, write_rank, write_records
from fastpeft.metrics.vqa import (
    Annotation,
    annotations_of,
    answer_accuracy,
    quick_accuracy,
    read_annotations,
    read_labels,
    read_vqa_results,
    vqa_accuracy,
    vqa_records,
)
from fastpeft.metrics.vqa_text import normalise, strip_punctuation
from tests.data.vl_files import question_entries, write_json


@pytest.mark.parametrize("matching, score", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (5, 1), (9, 1), (10, 1)])
def test_ten_annotators_of_whom_some_agree(matching, score):
    answers = ["red"] * matching + [f"other {i}" for i in range(10 - matching)]
    assert answer_accuracy("red", answers) == pytest.approx(score)
    assert answer_accuracy("Red.", answers[::-1]) == pytest.approx(score)


def test_leaving_each_annotator_out():
    """Literally: records compared with records, whatever their number."""
    for answers in (["a b", "c", "a b"], ["x", "x", "x", "y"], list("ppqqqrrrrs"), ["z"] * 5):
        for prediction in {*answers, "none of them at all"}:
            records = [{"answer": answer, "answer_id": number} for number, answer in enumerate(answers)]
            shares = []
            for record in records:
                others = [other for other in records if other != record]
                same = [other for other in others if other["answer"] == normalise(prediction)]
                shares.append(min(1, len(same) / 3))
            assert answer_accuracy(prediction, answers) == pytest.approx(sum(shares) / len(shares))


@pytest.mark.parametrize(
    "answer, wanted",
    [
        ("yes.", "yes"),
        (" Yes\n", "yes"),
        ("on\tthe table", "on table"),
        ("3.5", "3.5"),
        ("2.", "2"),
        ("p.m.", "pm"),
        (".5", ".5"),
        ("what?", "what"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("t-shirt", "t shirt"),
        ("t - shirt", "t shirt"),
        # One dash beside a space takes every dash without trace.
        ("x-ray - old", "xray old"),
        ("red,white", "red white"),
        ("red, white", "red white"),
        ("1,000", "1000"),
        # A comma between digits takes all punctuation without trace.
        ("1,000 t-shirts", "1000 tshirts"),
        ("(left) [or] {right}", "left or right"),
        ('"stop"', "stop"),
        ("z_b=c+d\\e<f>g@h`i", "z b c d e f g h i"),
        ("rock & roll!", "rock & roll"),
        ("5:30", "5:30"),
        ("man's", "man's"),
        ("$5", "$5"),
        ("a dog and the cat in an hour", "dog and cat in hour"),
        ("The", ""),
        ("none", "0"),
        ("zero one two three four five six seven eight nine ten", "0 1 2 3 4 5 6 7 8 9 10"),
        ("eleven", "eleven"),
        ("Two dogs", "2 dogs"),
        ("dont", "don't"),
        ("don't", "don't"),
        ("Wont he", "won't he"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("oclock", "o'clock"),
        ("yall'd've", "y'all'd've"),
        ("'ow'sat", "'ow's'at"),
        ("twas", "'twas"),
        ("hes", "he's"),
        ("its well", "its well"),
        ("shed", "shed"),
        ("im", "im"),
        ("somebody'd", "somebodyd"),
        ("somebodyd've", "somebody'd've"),
    ],
)
def test_normalisation(answer, wanted):
    assert normalise(answer) == wanted


def test_at_most_32_periods_are_taken_away():
    assert strip_punctuation("a" + "." * 40) == "a" + "." * 8


def test_annotators_answers_lose_punctuation_only_where_they_differ():
    assert answer_accuracy("t-shirt", ["t-shirt"] * 9 + ["shirt"]) == 1
    assert answer_accuracy("t-shirt", ["t-shirt"] * 10) == 0, "compared as it is, with a normalised prediction"
    assert answer_accuracy("the dog", ["the dog"] * 9 + ["cat"]) == 0, "articles stay in annotators' answers"
    assert answer_accuracy("dog", ["dog"] * 10) == 1


def annotated() -> dict[int, Annotation]:
    return {
        1: Annotation(("yes",) * 10, "is the", "yes/no"),
        2: Annotation(("2",) * 2 + ("3",) * 8, "how many", "number"),
        3: Annotation(("red",) * 3 + ("blue",) * 7, "what color", "other"),
        4: Annotation(("no",) * 10, "is the", "yes/no"),
    }


def test_scores_by_kind():
    scores = vqa_accuracy({1: "Yes", 2: "two", 3: "red", 4: "yes"}, annotated())
    assert scores.overall == pytest.approx((100 + 60 + 90 + 0) / 4)
    assert scores.by_question == pytest.approx({1: 100, 2: 60, 3: 90, 4: 0})
    assert scores.by_question_type == pytest.approx({"is the": 50, "how many": 60, "what color": 90})
    assert scores.by_answer_type == pytest.approx({"yes/no": 50, "number": 60, "other": 90})
    third = vqa_accuracy({1: "yes", 2: "5", 3: "5"}, {key: annotated()[key] for key in (1, 2, 3)})
    assert third.rounded()["overall"] == 33.33 and third.rounded()["perAnswerType"]["yes/no"] == 100


def test_ids_have_to_be_the_annotated_ones():
    with pytest.raises(DataError, match=r"each of 4 question_ids once: 1 without a prediction \(the first is 4\)"):
        vqa_accuracy({1: "a", 2: "a", 3: "a"}, annotated())
    with pytest.raises(DataError, match=r"1 without a prediction \(the first is 4\), 1 that nobody asked for \(.* 9\)"):
        vqa_accuracy({1: "a", 2: "a", 3: "a", 9: "a"}, annotated())
    with pytest.raises(DataError, match="no annotated questions"):
        vqa_accuracy({}, {})


def annotation_file(path):
    values = [
        {
            "question_id": question_id,
            "image_id": 5,
            "question_type": annotation.question_type,
            "answer_type": annotation.answer_type,
            "answers": [{"answer_id": i + 1, "answer": text} for i, text in enumerate(annotation.answers)],
        }
        for question_id, annotation in annotated().items()
    ]
    return write_json(path, {"info": {}, "annotations": values}), values


def test_annotation_file(tmp_path):
    path, values = annotation_file(tmp_path / "a.json")
    assert read_annotations(path) == annotated()
    for change, message in (
        (lambda v: v[1]["answers"][0].pop("answer"), r"entry 1: answers\[0\]: has no field 'answer'"),
        (lambda v: v[1]["answers"][0].update(answer_id=2), "entry 1: answers: expected an answer_id of its own for ea"),
        (lambda v: v[1].update(answers=[]), "entry 1: answers: expected a list of objects, got an empty one"),
        (lambda v: v[1].update(question_id=1), "entry 1: question_id 1 was there before"),
        (lambda v: v[1].pop("question_id"), "entry 1: has no field 'question_id'"),
    ):
        changed = json.loads(json.dumps(values))
        change(changed)
        with pytest.raises(DataError, match=message):
            read_annotations(write_json(tmp_path / "b.json", {"annotations": changed}))
    with pytest.raises(DataError, match="expected an object with the field 'annotations'"):
        read_annotations(write_json(tmp_path / "b.json", values))


def test_questions_with_their_answers_are_annotations(tmp_path):
    entries = question_entries(tmp_path)
    questions = read_vqa(write_json(tmp_path / "q.json", entries), tmp_path, training=False)
    found = annotations_of(questions)
    assert sorted(found[9].answers) == sorted(entries[2]["answer"]) and found[7].answer_type is None
    scores = vqa_accuracy({7: "no", 8: "two", 9: "c"}, found)
    assert scores.by_question == pytest.approx({7: 90, 8: 100, 9: 100 * (2 * (1 / 3) + 6 * (2 / 3)) / 8})
    entries[0] |= {"dataset": "vg", "answer": "yes"}
    questions = read_vqa(write_json(tmp_path / "q.json", entries), tmp_path, training=False)
    with pytest.raises(
        DataError, match=r"q\.json: entry 0 \(question_id 7\): VQA accuracy needs the answers of several"
    ):
        annotations_of(questions)
    assert annotations_of(questions, [1, 2]).keys() == {8, 9}
    del entries[2]["answer"]
    questions = read_vqa(write_json(tmp_path / "q.json", entries[1:]), tmp_path, training=False)
    with pytest.raises(
        DataError, match=r"q\.json: entry 1 \(question_id 9\): has no field 'answer', which VQA accuracy ne"
    ):
        annotations_of(questions)
    del entries[1]["question_id"]
    questions = read_vqa(write_json(tmp_path / "q.json", entries[1:2]), tmp_path, training=True)
    with pytest.raises(DataError, match=r"q\.json: entry 0 \('How many\?'\): VQA accuracy needs a question_id"):
        annotations_of(questions)


def test_quick_accuracy(tmp_path):
    values = [
        {"question_id": 1, "label": {"yes": 1, "no": 0.3}},
        {"question_id": 2, "label": {"t-shirt": 0.9, "t shirt": 0.6}},
        {"question_id": 3, "label": {"red": 1.0}},
    ]
    labels = read_labels(write_json(tmp_path / "l.json", values))
    predictions = {1: "no", 2: "t - shirt", 3: "blue"}
    assert quick_accuracy(predictions, labels) == pytest.approx(100 * (0.3 + 0.9) / 3)
    assert quick_accuracy(predictions, labels, exact=True) == pytest.approx(100 * 0.3 / 3)
    with pytest.raises(DataError, match=r"1 without a prediction \(the first is 3\)"):
        quick_accuracy({1: "no", 2: "a"}, labels)
    values[1]["label"]["t shirt"] = "0.6"
    with pytest.raises(DataError, match=r"l\.json: entry 1: label\['t shirt'\]: expected a number, got '0.6'"):
        read_labels(write_json(tmp_path / "l.json", values))


def test_result_file(tmp_path):
    records = vqa_records({5: "yes", 6: "naïve"})
    assert records == [{"question_id": 5, "answer": "yes"}, {"question_id": 6, "answer": "naïve"}]
    path = write_records(tmp_path / "sub/r.json", records)
    assert read_vqa_results(path) == {5: "yes", 6: "naïve"} and [p.name for p in path.parent.iterdir()] == ["r.json"]
    write_records(path, records + records[:1])
    with pytest.raises(DataError, match="1 question_ids are there more than once"):
        read_vqa_results(path)
    with pytest.raises(DataError, match=r"entry 1: answer: expected a text, got 5"):
        read_vqa_results(write_json(path, [*records[:1], {"question_id": 6, "answer": 5}]))


def test_ranks_are_merged_without_duplicates(tmp_path):
    write_rank(tmp_path, "val", 0, vqa_records({1: "a", 2: "b"}))
    write_rank(tmp_path, "val", 1, vqa_records({3: "c", 1: "a", 2: "other"}))
    write_rank(tmp_path, "val", 2, [])
    with pytest.raises(DataError, match=r"val\.json: expected each of 4 question_ids once: 1 without a prediction"):
        merge_ranks(tmp_path, "val", 3, expected=[1, 2, 3, 4])
    merged = merge_ranks(tmp_path, "val", 3, expected=[1, 2, 3])
    assert read_vqa_results(tmp_path / "val.json") == {1: "a", 2: "b", 3: "c"}
    assert (merged.repeated, merged.differing) == (2, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["val.json"], "ranks' files are gone"
    write_rank(tmp_path, "val", 0, [])
    with pytest.raises(DataError, match=r"val_rank1\.json: no such file"):
        merge_ranks(tmp_path, "val", 2)
    rank_file(tmp_path, "val", 1).write_text('[{"answer": "x"}]')
    with pytest.raises(DataError, match=r"val_rank1\.json: entry 0: has no field 'question_id'"):
        merge_ranks(tmp_path, "val", 2)
    assert read_records(tmp_path / "val.json", "question_id")[0]["answer"] == "a", "a failed merge leaves the old file"
