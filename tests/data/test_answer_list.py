"""A list of answers to choose from: what is wrong in it, and what it lacks, is named."""

from __future__ import annotations

import pytest

from fastpeft.data import DataError
from fastpeft.data.answer_list import check_answers, read_answer_list
from fastpeft.data.vqa import read_vqa
from tests.data.vl_files import question_entries, write_json


def test_answers_are_as_the_file_has_them(tmp_path):
    answers = ["yes", "No", " t-shirt", "2"]
    assert read_answer_list(write_json(tmp_path / "answers.json", answers)) == answers


@pytest.mark.parametrize(
    "values, message",
    [
        ({"yes": 1}, r"answers\.json: expected a list of answers, got an object of 1"),
        ([], r"answers\.json: expected a list of answers, got an empty one"),
        (["yes", 2], r"answers\.json: entry 1: expected a text, got 2"),
        (["yes", ["no"]], r"answers\.json: entry 1: expected a text, got a list of 1"),
        (["yes", " "], r"answers\.json: entry 1: expected a text, got a blank one"),
        (["yes", "no", "Yes "], r"answers\.json: entry 2: 'Yes ' was there before, at entry 0"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, values, message):
    with pytest.raises(DataError, match=message) as caught:
        read_answer_list(write_json(tmp_path / "answers.json", values))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"answers\.json: no such file"):
        read_answer_list(tmp_path / "answers.json")


def check(tmp_path, answers, *, training, numbers=(0, 1, 2), change=lambda entries: None):
    entries = question_entries(tmp_path)
    change(entries)
    # The last question is in a file of its own.
    files = [write_json(tmp_path / "a.json", entries[:2]), write_json(tmp_path / "b.json", entries[2:])]
    questions = read_vqa(files, tmp_path, training=training)
    check_answers("answers.json", answers, questions, numbers, training=training)


def test_every_answer_that_is_trained_on_must_be_there(tmp_path):
    check(tmp_path, ["YES", "no ", "2", "a", "b", "c"], training=True)
    check(tmp_path, ["yes", "no", "2"], training=True, numbers=(0, 1))
    with pytest.raises(DataError) as caught:
        check(tmp_path, ["yes", "no", "2", "b"], training=True)
    where = f"{tmp_path / 'b.json'}: entry 0 (question_id 9)"
    assert str(caught.value) == f"answers.json: lacks 'a', an answer of {where}, and 1 more"
    with pytest.raises(DataError, match=r"lacks '2', an answer of .*a\.json: entry 1 \('How many\?'\)$"):
        check(
            tmp_path, ["yes", "no"], training=True, numbers=(0, 1), change=lambda entries: entries[1].pop("question_id")
        )


def test_of_an_evaluated_question_the_answer_of_the_most_must_be_there(tmp_path):
    check(tmp_path, ["yes", "2", "a"], training=False)
    with pytest.raises(DataError, match=r"lacks 'yes', the answer that most annotators gave of .*a\.json: entry 0 \("):
        check(tmp_path, ["no", "2", "a"], training=False)
    # One of two that were given equally often is enough, and questions without answers ask for none.
    check(tmp_path, ["no", "2", "a"], training=False, change=lambda e: e[0].update(answer=["yes"] * 5 + ["no"] * 5))
    check(tmp_path, ["2", "a"], training=False, change=lambda entries: entries[0].pop("answer"))
