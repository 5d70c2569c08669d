"""Caption scores against small computations of their own, and the two tokenizers against each other."""

from __future__ import annotations

import math
import os
from collections import Counter

import pytest

from fastpeft.data import DataError
from fastpeft.data.captions import read_captions
from fastpeft.metrics import ptb
from fastpeft.metrics.captions import (
    METRICS,
    caption_records,
    check_words,
    coco_submission,
    numbered,
    read_caption_results,
    score_captions,
)
from fastpeft.metrics.result_files import merge_ranks, write_rank, write_records
from tests.data.vl_files import caption_entries, write_json

needs_java = pytest.mark.skipif(ptb.java() is None, reason="needs Java")
WITHOUT_JAVA = tuple(name for name in METRICS if name != "METEOR")

# A caption and its words, as COCO's tokenizer makes them.
TOKENIZED = [
    ("A man riding a wave on top of a surfboard.", "a man riding a wave on top of a surfboard"),
    ("THERE ARE PEOPLE SITTING IN A ROOM", "there are people sitting in a room"),
    ("A motorcycle, wrapped in plastic, is parked.", "a motorcycle wrapped in plastic is parked"),
    ("a woman's cat isn't on the dogs' bed", "a woman 's cat is n't on the dogs bed"),
    ("They're playing; it's 5:30 p.m. on Main St.", "they 're playing it 's 5:30 p.m. on main st."),
    ("The sign reads \"stop\" - or 'STOP'", "the sign reads stop or stop"),
    ("two t-shirts and a black-and-white photo", "two t-shirts and a black-and-white photo"),
    ("a man (left) and a woman [right]", "a man -lrb- left -rrb- and a woman -lsb- right -rsb-"),
    ("He cannot swim and they're gonna laugh", "he can not swim and they 're gon na laugh"),
    ("I won't, can't, and don't!", "i wo n't ca n't and do n't"),
    ("Really?! Yes!!!", "really ?! yes !!!"),
    ("1,000 birds, 3.5 feet tall, cost $5.50 or 10%", "1,000 birds 3.5 feet tall cost $ 5.50 or 10 %"),
    ("half of a pizza, and/or 1/2 of a pie with w/ a fork", "half of a pizza and/or 1/2 of a pie with w / a fork"),
    ("2 1/2 cups", "2\u00a01/2 cups"),
    ("A train from the '80s or 1950's", "a train from the '80s or 1950 's"),
    ("rock 'n' roll at 6 o'clock", "rock 'n' roll at 6 o'clock"),
    ("Mr. Smith and Dr. Jones vs. the U.S.", "mr. smith and dr. jones vs. the u.s."),
    ("a dog.", "a dog"),
    ("the end... of -- everything", "the end of everything"),
    ("one,two and a dog.Another cat", "one two and a dog.another cat"),
    ("bread & butter, a B&W photo, b&b", "bread & butter a b&w photo b & b"),
    ("a 4-year-old; no. 5 bus: #1 @ home", "a 4-year-old no. 5 bus # 1 @ home"),
    ("\u201cA\u201d caf\u00e9\u2019s cup \u2014 nice", "a caf\u00e9 's cup nice"),
    ("   ", ""),
    ("", ""),
]
ORDINARY = """
A group of people sitting in a waiting room with a vending machine.
Several people seated in chairs in a waiting room with a Snapple machine in the far corner.
A motor bike parked in front of a building with a cover on it
This is a master bedroom, complete with a matching bedroom furniture set.
A baseball player's glove; the pitcher is getting ready to throw.
A blonde boy stands looking happily at the camera!
Two ducks floating in a green, grassy pond.
There's a man who doesn't look at the stop sign's back.
A person on skis, wearing a red jacket, goes down a snow-covered hill.
An old-fashioned clock on the side of St. Paul's church at 10:30.
A kitchen with stainless-steel appliances and a "welcome" mat
People wait for the no. 7 bus on 5th Ave. in New York.
A double-decker bus that says "Oxford Circus" on its front.
Three zebras escape the sun in the shade of a line of trees
a plate of food: broccoli, rice, and meat
A close-up of a cat's face (with green eyes).
The couple's dog wouldn't get off the couch, so they're sitting on the floor.
someone's laptop, cell phone & keys are on a desk
A man in a suit and tie - he's smiling.
A surfer is about to be knocked down by a large wave...
A 1950's style diner with a neon "OPEN 24/7" sign.
A jet airliner (Boeing 747) taking off from an airport runway.
Children playing with a frisbee in a park; some are running.
What's that on the giraffe's head?
A bowl of soup, a sandwich and 2 glasses of water on a table.
two men in ties, one w/ glasses
A man holds up his hand: "Hi!"
A tennis player serves at the U.S. Open.
A skateboarder in mid-air over a set of stairs at 3 p.m.
A half-eaten hot dog with ketchup/mustard on a napkin.
""".strip().splitlines()

REFERENCES = {
    "a": ["a man rides a brown horse on the beach", "the man is riding a horse"],
    "b": ["two dogs run in the green grass", "two dogs are running", "dogs in the grass"],
    "c": ["a red bus drives down the street"],
    "d": ["a man and two dogs on the street", "dogs beside a man"],
}
PREDICTIONS = {
    "a": "a man riding a horse on the beach",
    "b": "two dogs in the grass",
    "c": "a red bus drives down the street",
    "d": "a cat",
}


@pytest.mark.parametrize("caption, words", TOKENIZED)
def test_words_of_a_caption(caption, words):
    assert " ".join(ptb.python_tokens(caption)) == words


@needs_java
def test_both_tokenizers_make_the_same_words():
    captions = [caption for caption, _ in TOKENIZED] + ORDINARY
    for caption, theirs in zip(captions, ptb.java_tokens(captions), strict=True):
        assert ptb.python_tokens(caption) == theirs, caption


@needs_java
def test_captions_do_not_run_into_each_other():
    """Line breaks of all kinds, blank captions, and a number at the beginning of the next one."""
    captions = ["there is no.", "5 cats", "", "one\ntwo\u2028three\r\nfour", " ", "end"]
    found = ptb.java_tokens(captions)
    assert found == [["there", "is", "no"], ["5", "cats"], [], ["one", "two", "three", "four"], [], ["end"]]
    assert ptb.java_tokens([]) == []


def grams(text: str, n: int) -> Counter:
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def cider(predictions, references) -> dict:
    """CIDEr-D from its definition: clipped cosines of weighted n-grams, with a penalty for another length."""
    total, scores = math.log(len(references)), {}
    seen = Counter()
    for texts in references.values():
        seen.update({gram for text in texts for n in range(1, 5) for gram in grams(text, n)})

    def weighted(text, n):
        return {gram: count * (total - math.log(max(1, seen[gram]))) for gram, count in grams(text, n).items()}

    def norm(vector):
        return math.sqrt(sum(value**2 for value in vector.values()))

    for image, texts in references.items():
        mean = 0.0
        for text in texts:
            gap = len(predictions[image].split()) - len(text.split())
            for n in range(1, 5):
                hypothesis, reference = weighted(predictions[image], n), weighted(text, n)
                if norm(hypothesis) and norm(reference):
                    dot = sum(min(value, reference.get(g, 0)) * reference.get(g, 0) for g, value in hypothesis.items())
                    mean += dot / norm(hypothesis) / norm(reference) * math.exp(-(gap**2) / 72) / 4
        scores[image] = 10 * mean / len(texts)
    return scores


def bleu(predictions, references, order: int) -> float:
    """BLEU from its definition, with the reference length nearest to each prediction's."""
    logs, length, wanted = 0.0, 0, 0
    for image, prediction in predictions.items():
        own = len(prediction.split())
        length += own
        wanted += min((abs(len(text.split()) - own), len(text.split())) for text in references[image])[1]
    for n in range(1, order + 1):
        hit = tried = 0
        for image, prediction in predictions.items():
            most = Counter()
            for text in references[image]:
                most |= grams(text, n)
            hit += (grams(prediction, n) & most).total()
            tried += grams(prediction, n).total()
        logs += math.log(hit / tried) / order
    return math.exp(logs + min(0.0, 1 - wanted / length))


def test_scores_are_those_of_the_definitions():
    found = score_captions(PREDICTIONS, REFERENCES, tokenizer="python", metrics=WITHOUT_JAVA)
    assert list(found.scores) == list(WITHOUT_JAVA) and not found.not_computed and found.tokenizer == "python"
    wanted = cider(PREDICTIONS, REFERENCES)
    assert found.scores["CIDEr"] == pytest.approx(sum(wanted.values()) / 4, rel=1e-9)
    assert {image: scores["CIDEr"] for image, scores in found.by_image.items()} == pytest.approx(wanted)
    assert wanted["c"] == pytest.approx(10) and wanted["d"] < 1 < wanted["b"]
    for order in range(1, 5):
        assert found.scores[f"Bleu_{order}"] == pytest.approx(bleu(PREDICTIONS, REFERENCES, order), rel=1e-6)
    # b: "two dogs in the grass" is a subsequence of the first reference (5 of 7 words) and has 4 of 4 of the third.
    precision, recall = 1.0, 1.0
    assert found.by_image["b"]["ROUGE_L"] == pytest.approx(2.44 * precision * recall / (recall + 1.44 * precision))
    assert found.by_image["d"]["ROUGE_L"] == pytest.approx(2.44 * (1 / 2) * (1 / 4) / (1 / 4 + 1.44 / 2))


def test_punctuation_and_case_do_not_count():
    loud = {image: f'"{text.upper()}!"' for image, text in PREDICTIONS.items()}
    scores = [
        score_captions(captions, REFERENCES, tokenizer="python", metrics=WITHOUT_JAVA).scores
        for captions in (PREDICTIONS, loud)
    ]
    assert scores[0] == scores[1]


def test_some_metrics_and_blank_predictions(capsys):
    blank = PREDICTIONS | {"a": "", "b": "..."}
    found = score_captions(blank, REFERENCES, tokenizer="python", metrics=("CIDEr", "Bleu_2"))
    assert set(found.scores) == {"CIDEr", "Bleu_2"}
    assert found.by_image["a"] == found.by_image["b"] == pytest.approx({"CIDEr": 0, "Bleu_2": 0}, abs=1e-9)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "change, message",
    [
        ({"predictions": {"a": "x"}}, r"captions: expected each of 4 images once: 3 without a prediction"),
        ({"predictions": PREDICTIONS | {"e": "x"}}, r"1 that nobody asked for \(the first is e\)"),
        ({"references": REFERENCES | {"a": []}}, r"image a: expected a list of at least one reference, got \[\]"),
        ({"references": REFERENCES | {"a": "text"}}, r"image a: expected a list of at least one reference, got 'text'"),
        ({"references": {}, "predictions": {}}, r"no images to score"),
        ({"tokenizer": "perl"}, r"tokenizer: expected one of java, python, got 'perl'"),
        ({"metrics": ("CIDER",)}, r"metrics: expected some of Bleu_1, .*, got 'CIDER'"),
    ],
)
def test_what_cannot_be_scored(change, message):
    with pytest.raises(DataError, match=message):
        score_captions(**{"predictions": PREDICTIONS, "references": REFERENCES, "tokenizer": "python"} | change)


@pytest.mark.parametrize("tokenizer", ["python", pytest.param("java", marks=needs_java)])
def test_references_without_a_word_are_named(tokenizer):
    wordless = {"b": (".", "!"), "a": ("...",)}
    message = r"captions: no reference has a word to score by; the first image is b, which has '\.'"
    with pytest.raises(DataError, match=message):
        score_captions({"a": "a cat", "b": "a dog"}, wordless, tokenizer=tokenizer, metrics=("CIDEr",))
    with pytest.raises(DataError, match=message):
        check_words(wordless, tokenizer)
    # One image may be without, as long as another is not.
    some = wordless | {"a": ("...", "A cat.")}
    check_words(some, tokenizer)
    assert score_captions({"a": "a cat", "b": "a dog"}, some, tokenizer=tokenizer, metrics=("CIDEr",)).scores


@pytest.fixture
def java_is(tmp_path, monkeypatch):
    """Put another `java`, or none, in place of the system's."""

    def put(script: str | None) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        if script is not None:
            (folder / "java").write_text(f"#!/bin/sh\n{script}\n")
            (folder / "java").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))
        ptb.java.cache_clear()

    yield put
    monkeypatch.undo()
    ptb.java.cache_clear()


@pytest.mark.parametrize("script", [None, "exit 1"])
def test_without_java(java_is, script):
    java_is(script)
    with pytest.raises(DataError, match=r"needs Java.*default-jre-headless.*tokenizer=\"python\""):
        score_captions(PREDICTIONS, REFERENCES)
    found = score_captions(PREDICTIONS, REFERENCES, tokenizer="python")
    assert found.not_computed == {"METEOR": "needs Java, and no 'java' that runs was found"}
    assert set(found.scores) == set(WITHOUT_JAVA)


def test_java_that_fails(java_is):
    java_is('[ "$1" = -version ] && exit 0\necho "no memory" >&2\nexit 3')
    with pytest.raises(DataError, match="COCO's tokenizer failed under Java: it said 'no memory'"):
        score_captions(PREDICTIONS, REFERENCES)
    with pytest.raises(DataError, match="METEOR failed under Java"):
        score_captions(PREDICTIONS, REFERENCES, tokenizer="python")


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(ptb, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pycocoevalcap, which is not installed; pip install 'fastpeft\[vl\]'"):
        score_captions(PREDICTIONS, REFERENCES, tokenizer="python")


@pytest.mark.slow
@needs_java
def test_everything_with_java():
    """METEOR reads a large table of paraphrases, which takes it ten seconds."""
    found = score_captions(PREDICTIONS, REFERENCES)
    plain = score_captions(PREDICTIONS, REFERENCES, tokenizer="python")
    assert found.scores == plain.scores and tuple(found.scores) == METRICS and not found.not_computed
    each = {image: scores["METEOR"] for image, scores in found.by_image.items()}
    assert each["c"] == pytest.approx(1) and 0 < each["d"] < each["b"] < 1
    assert 0 < found.scores["METEOR"] < 1


def test_result_files(tmp_path):
    captions = read_captions(write_json(tmp_path / "c.json", caption_entries(tmp_path)), tmp_path)
    names = [image.name for image in captions.images]
    predictions = {name: f"caption {i}" for i, name in enumerate(names)}
    records = caption_records(predictions, captions)
    assert records[1] == {
        "question_id": names[1],
        "pred_caption": "caption 1",
        "gold_caption": [f"picture 1 sentence {j}" for j in range(3)],
    }
    write_rank(tmp_path, "test", 0, records[::2])
    write_rank(tmp_path, "test", 1, [records[1], records[0]])
    merged = merge_ranks(tmp_path, "test", 2, expected=names)
    assert (merged.repeated, merged.differing) == (1, 0)
    read, references = read_caption_results(tmp_path / "test.json")
    assert read == predictions
    assert {name: tuple(texts) for name, texts in references.items()} == captions.references()
    assert coco_submission(predictions, captions)[2] == {"image_id": 3, "caption": "caption 2"}
    write_records(tmp_path / "test.json", [*records, records[0]])
    with pytest.raises(DataError, match="is there more than once"):
        read_caption_results(tmp_path / "test.json")
    write_records(tmp_path / "test.json", [records[0] | {"gold_caption": "text"}])
    with pytest.raises(DataError, match="gold_caption: expected a list of texts, got 'text'"):
        read_caption_results(tmp_path / "test.json")


def test_a_submission_needs_numbers(tmp_path):
    entries = caption_entries(tmp_path, (1,))
    os.rename(tmp_path / "train2014_img" / entries[0]["filename"], tmp_path / "train2014_img" / "a.png")
    entries[0]["filename"] = "a.png"
    captions = read_captions(write_json(tmp_path / "c.json", entries), tmp_path)
    with pytest.raises(DataError, match=r"image 'a\.png' has no COCO number"):
        coco_submission({"a.png": "x"}, captions)
    assert not numbered(captions)
    twice = caption_entries(tmp_path, (1, 1))
    assert numbered(read_captions(write_json(tmp_path / "c.json", twice), tmp_path))
    twice[1]["cocoid"] = 1
    with pytest.raises(DataError, match=r"'COCO_train2014_0+1\.png' and 'COCO_val.*' have the same COCO number 1$"):
        numbered(read_captions(write_json(tmp_path / "c.json", twice), tmp_path))
