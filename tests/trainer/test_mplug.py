"""Whole runs of a tiny mPLUG in this process: captions and questions about coloured squares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import fastpeft
from fastpeft.config import load_config
from fastpeft.metrics import ptb
from fastpeft.models.mplug import MPlug
from fastpeft.models.mplug.generation import generate
from fastpeft.trainer.loop import Loop
from fastpeft.trainer.mplug import captioning, work
from fastpeft.trainer.mplug.work import MPlugWork
from fastpeft.trainer.stepper import Stepper
from tests.native.amx import needs_amx
from tests.trainer import vl
from tests.trainer.test_resume import Killed, interrupt_after

LEARNING = [{"name": "lora", "rank": 4, "targets": ["q", "k"]}, {"name": "classifier"}]


@pytest.fixture(scope="session")
def squares(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("squares")
    vl.make(root)
    return root


@pytest.fixture
def write(squares, tmp_path):
    """Write a configuration file, given the sections that differ from the defaults, and return its path."""

    def write(kind: str = "captions", *, out: str = "out", **changes) -> Path:
        tree = vl.config(squares, kind, out=str(tmp_path / out), **changes)
        # Text is generated at the end only, unless a test is about more.
        tree["train"].setdefault("eval_every", 0)
        path = tmp_path / f"{out}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def close(first: Path, second: Path, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    expected = adapter(second)
    for name, tensor in adapter(first).items():
        torch.testing.assert_close(tensor, expected[name], rtol=rtol, atol=atol)


def one_line(err: str) -> str:
    lines = [line for line in err.strip().splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


def test_captioning_learns_and_leaves_everything_it_promises(train, write, tmp_path):
    config = write(method=LEARNING, train={"steps": 80, "warmup_steps": 4, "eval_every": 40, "base_lr": 2e-2})
    code, out, err = train(config)
    assert code == 0, err
    found = results(tmp_path / "out")
    first, last = found["history"]
    assert (first["step"], last["step"]) == (40, 80)
    assert last["train_loss"] < 0.5 * first["train_loss"]
    assert "step 40/80" in out and "step 80/80" in out
    assert found["test_cider"]["best_val"] is not None and set(found["test_scores"]) == {"cider", "bleu_4"}
    # Something like the references was generated, of every test image once.
    predictions = json.loads((tmp_path / "out" / "predictions" / "test.json").read_text())
    assert [sorted(entry) for entry in predictions] == [["gold_caption", "pred_caption", "question_id"]] * 6
    assert len({entry["question_id"] for entry in predictions}) == 6
    assert found["test_scores"]["cider"] > 0.2
    assert found["cached_features"] == "the image tower (train, val, test)"
    assert found["trained_parameters"] == sum(tensor.numel() for tensor in adapter(tmp_path / "out").values())


def test_captions_of_numbered_images_are_written_for_submission(train, write, tmp_path, squares):
    tree = json.loads((squares / "captions.json").read_text())
    for number, image in enumerate(tree["images"]):
        image["cocoid"] = 1000 + number
    (tmp_path / "numbered.json").write_text(json.dumps(tree))
    files = dict.fromkeys(("train", "val", "test"), str(tmp_path / "numbered.json"))
    for name, data in (("numbered", files), ("plain", {})):
        assert train(write(data=data, out=name))[0] == 0
    folder = tmp_path / "numbered" / "predictions"
    for split in ("val", "test"):
        numbers = {image["filename"]: image["cocoid"] for image in tree["images"] if image["split"] == split}
        said = {
            entry["question_id"]: entry["pred_caption"] for entry in json.loads((folder / f"{split}.json").read_text())
        }
        submission = json.loads((folder / f"{split}_coco.json").read_text())
        assert submission == [{"image_id": numbers[name], "caption": text} for name, text in said.items()]
        assert len(submission) == 6
    # Names without a number, and no others.
    assert sorted(path.name for path in (tmp_path / "plain" / "predictions").iterdir()) == ["test.json", "val.json"]


def test_answers_are_learned_and_written_for_submission(train, write, tmp_path):
    code, _, err = train(write("vqa", method=LEARNING, train={"steps": 80, "base_lr": 2e-2}))
    assert code == 0, err
    found = results(tmp_path / "out")
    predictions = json.loads((tmp_path / "out" / "predictions" / "test.json").read_text())
    assert sorted(entry["question_id"] for entry in predictions) == list(range(10, 22))
    assert {tuple(sorted(entry)) for entry in predictions} == {("answer", "question_id")}
    # Colours and sides are told apart by the question, if by nothing else.
    assert found["test_accuracy"]["last"] >= 0.3
    assert found["metric"] == "accuracy"


def answer_list(tmp_path: Path, *answers: str) -> str:
    path = tmp_path / "answer_list.json"
    path.write_text(json.dumps(answers))
    return str(path)


EVERY_ANSWER = ("red", "green", "blue", "left", "right", "it is left", "it is right")


def test_answers_are_chosen_from_a_list(train, write, tmp_path):
    options = {"train": {"steps": 40, "base_lr": 2e-2}, "method": LEARNING}
    given = {"answer_list": answer_list(tmp_path, *EVERY_ANSWER)}
    code, out, err = train(write("vqa", data=given, out="chosen", **options))
    assert code == 0, err
    assert "7 answers to choose from" in out
    assert results(tmp_path / "chosen")["test_accuracy"]["last"] >= 0.3
    # Of answers that are never trained on, the text is one nevertheless.
    given = {"answer_list": answer_list(tmp_path, "a Picture", "no"), "answers_outside": "keep"}
    code, _, err = train(write("vqa", data=given, out="strange", **options))
    assert code == 0, err
    said = {
        name: {entry["answer"] for entry in json.loads((tmp_path / name / "predictions" / "test.json").read_text())}
        for name in ("chosen", "strange")
    }
    assert said["strange"] <= {"a Picture", "no"} and said["chosen"] <= set(EVERY_ANSWER)
    assert results(tmp_path / "strange")["test_accuracy"]["last"] == 0


def test_an_answer_list_that_lacks_an_answer_is_named(train, write, tmp_path, squares):
    path = answer_list(tmp_path, *(answer for answer in EVERY_ANSWER if answer != "blue"))
    code, _, err = train(write("vqa", data={"answer_list": path}))
    expected = f"{path}: lacks 'blue', an answer of {squares / 'vqa_train.json'}: entry 32 (question_id 42)"
    assert code == 2 and one_line(err).endswith(f"data: {expected}")
    # What only a minority said in validation or test may be missing, what most said may not.
    entries = json.loads((squares / "vqa_val.json").read_text())
    entries[4]["answer"] = ["teal"] * 6 + ["navy"] * 4
    (tmp_path / "val.json").write_text(json.dumps(entries))
    files = {"val": str(tmp_path / "val.json"), "answer_list": answer_list(tmp_path, *EVERY_ANSWER, "navy")}
    code, _, err = train(write("vqa", data=files))
    where = f"{tmp_path / 'val.json'}: entry 4 (question_id 14)"
    assert code == 2 and f"lacks 'teal', the answer that most annotators gave of {where}" in one_line(err)
    assert train(write("vqa", data=files | {"val_size": 4}))[0] == 0, "it is not asked"


def test_an_answer_too_long_to_be_chosen_is_named_before_training(train, write, tmp_path):
    path = answer_list(tmp_path, *EVERY_ANSWER, "red " * 40)
    code, _, err = train(write("vqa", data={"answer_list": path}))
    assert code == 2 and f"{path}: entry 7: has 41 tokens, and the model 40 positions" in one_line(err)


@pytest.mark.parametrize("habits", [{}, {"frozen_beams": True, "early_stop": False}], ids=("original", "other"))
def test_the_searchs_habits_are_as_configured(train, write, monkeypatch, habits):
    seen = []

    def recorded(model, memory, settings):
        seen.append(settings)
        return generate(model, memory, settings)

    monkeypatch.setattr(work, "generate", recorded)
    code, _, err = train(write(eval=habits, train={"steps": 2}))
    assert code == 0, err
    expected = habits or {"frozen_beams": False, "early_stop": True}
    assert seen and all((s.frozen_beams, s.early_stop) == tuple(expected.values()) for s in seen)


LONG = "red " * 60


@pytest.mark.parametrize(
    "kind, changes, expected",
    [
        ("captions", {"eval": {"max_length": 41}}, "eval: max_length: 41 tokens do not fit the model's 40 positions"),
        ("captions", {"data": {"max_length": 42}}, "data: max_length: 42 tokens do not fit the model's 40 positions"),
        ("captions", {"data": {"prompt": LONG}}, "red ': has 61 tokens, and the model 40 positions"),
        ("vqa", {"eval": {"max_length": 41}}, "eval: max_length: 41 tokens do not fit the model's 40 positions"),
        ("vqa", {"data": {"max_length": 41}}, "data: max_length: 41 tokens do not fit"),
    ],
)
def test_lengths_without_positions_are_told_before_training(train, write, tmp_path, kind, changes, expected):
    code, _, err = train(write(kind, **changes))
    assert code == 2 and expected in one_line(err)
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize(
    "split, field, value, expected",
    [
        ("val", "question", LONG, "entry 2 (question_id 12): question: has 65 tokens, and the model 40 positions"),
        ("test", "question", LONG, "entry 2 (question_id 12): question: has 65 tokens, and the model 40 positions"),
        ("train", "answer", ["red"] * 9 + [LONG.strip()], f"entry 2 (question_id 12): answer '{LONG.strip()}': has 61"),
    ],
)
def test_texts_without_positions_are_named_before_training(
    train, write, tmp_path, squares, split, field, value, expected
):
    entries = json.loads((squares / f"vqa_{split}.json").read_text())
    entries[2][field] = value
    (tmp_path / "long.json").write_text(json.dumps(entries))
    code, _, err = train(write("vqa", data={split: str(tmp_path / "long.json")}))
    assert code == 2 and f"data: {tmp_path / 'long.json'}: {expected}" in one_line(err)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_texts_as_long_as_the_positions_train(train, write):
    code, _, err = train(write(data={"max_length": 41}, eval={"max_length": 40}, train={"steps": 2}))
    assert code == 0, err


def test_a_run_goes_on_though_there_are_new_keys(train, write, tmp_path):
    config = write("vqa", data={"val": None})
    assert train(config)[0] == 0
    (path,) = (tmp_path / "out").rglob("config.json")
    identity = json.loads(path.read_text())
    assert identity.pop("data.answer_list") is None
    path.write_text(json.dumps(identity))
    assert train(config)[0] == 0
    code, _, err = train(config, f"data.answer_list={answer_list(tmp_path, *EVERY_ANSWER)}")
    assert code == 2 and "another configuration: data.answer_list (was None, now " in one_line(err)


def test_a_long_question_keeps_the_templates_end(train, write, monkeypatch):
    from fastpeft.trainer.mplug.answering import Answering

    seen = []
    memory = Answering.memory
    monkeypatch.setattr(
        Answering, "memory", lambda self, image, batch: (seen.append((self, batch)), memory(self, image, batch))[1]
    )
    # [CLS] question : what color is the square ? answer :
    code, _, err = train(write("vqa", data={"val": None, "max_length": 8}, train={"steps": 1, "warmup_steps": 0}))
    assert code == 0, err
    (work, trained), (_, asked) = seen[0], seen[-1]
    texts = {work.task.tokenizer.decode(ids) for ids in trained.question_ids}
    assert texts <= {"question : what color is answer :", "question : where is the answer :"}, texts
    assert "question : where is the square? answer :" in {work.task.tokenizer.decode(ids) for ids in asked.question_ids}


def test_the_adapter_fits_a_model_that_is_built_without_the_trainer(train, write, tmp_path, squares):
    config = write(method={"name": "prefix", "length": 3, "form": "hidden"})
    assert train(config)[0] == 0
    from fastpeft.trainer.mplug.build import build_mplug, open_tokenizer

    saved = fastpeft.read_config(tmp_path / "out" / "adapter")
    settings = load_config(config).model
    torch.manual_seed(saved["init_seed"])
    model = build_mplug(settings, open_tokenizer(settings))
    assert isinstance(fastpeft.load(model, tmp_path / "out" / "adapter"), MPlug)
    assert saved["task"] == {"name": "coco_caption", "route": "fused", "prompt": "a picture of"}


@pytest.mark.parametrize(
    "kind, augment", [pytest.param("captions", "none", marks=pytest.mark.slow), ("vqa", "rand_augment")]
)
def test_resuming_anywhere_gives_the_same_bytes(train, write, tmp_path, monkeypatch, kind, augment):
    sizes = vl.config(tmp_path)["model"]["sizes"] | {"dropout": 0.2, "attention_dropout": 0.1}
    changes = {
        # Trained with it, the backbone drops out.
        "method": {"name": "full"} if kind == "vqa" else [{"name": "lora", "dropout": 0.2}, {"name": "classifier"}],
        "model": {"sizes": sizes},
        "data": {"augment": augment, "data_ratio": 0.3, "val": None},
        "train": {"steps": 9, "grad_accumulation": 2, "checkpoint_every": "2 steps"},
    }
    assert train(write(kind, out="whole", **changes))[0] == 0
    config = write(kind, out="cut", **changes)
    for steps in (3, 7):
        with monkeypatch.context() as patch:
            interrupt_after(patch, steps)
            with pytest.raises(Killed):
                train(config)
    code, out, err = train(config)
    assert code == 0 and "resuming  after step 6" in out, err
    first, second = ((tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert first.read_bytes() == second.read_bytes()


def test_a_run_that_is_evaluated_at_its_end_alone_is_saved_before(train, write, tmp_path, monkeypatch):
    changes = {"train": {"steps": 20}, "data": {"val": None}}
    assert train(write(out="whole", **changes))[0] == 0
    config = write(out="cut", **changes)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 13)
        with pytest.raises(Killed):
            train(config)
    # Every tenth of the run.
    assert (tmp_path / "cut" / "checkpoints" / "step-00000012").is_dir()
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "measure", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            train(config)
    code, out, err = train(config)
    assert code == 0 and "resuming  after step 20" in out, err
    first, second = ((tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert first.read_bytes() == second.read_bytes()


def test_the_best_part_on_validation_is_kept(train, write, tmp_path, monkeypatch):
    scores = {"val": iter([0.2, 0.9, 0.5]), "test": iter([0.3, 0.7])}
    monkeypatch.setattr(Loop, "measure", lambda self, split: {f"{split}_cider": next(scores[split])})
    code, out, err = train(write(train={"steps": 6, "eval_every": 2}))
    assert code == 0, err
    found = results(tmp_path / "out")
    assert found["selected_epoch"] == 2
    assert found["test_cider"] == {"last": 0.3, "best_val": 0.7}
    assert fastpeft.read_config(tmp_path / "out" / "adapter")["epoch"] == 2
    assert "70.0 at step 4, the best on validation" in out


def test_a_smaller_share_of_the_data_is_part_of_a_larger_one(write):
    chosen = {}
    for ratio, seed in ((0.1, 0), (0.5, 0), (0.1, 1)):
        config = load_config(write(data={"data_ratio": ratio, "seed": seed}))
        chosen[ratio, seed] = set(captioning.prepare(config, "run.yaml")[0].splits["train"].dataset.chosen)
    assert [len(share) for share in chosen.values()] == [5, 24, 5]
    assert chosen[0.1, 0] < chosen[0.5, 0] and chosen[0.1, 0] != chosen[0.1, 1]


@pytest.mark.parametrize("kind", ["captions", pytest.param("vqa", marks=pytest.mark.slow)])
def test_accumulated_micro_batches_are_one_step_though_texts_have_different_lengths(train, write, tmp_path, kind):
    # SGD: what AdamW makes of a gradient hides its size.
    for parts in (1, 4):
        options = {"grad_accumulation": parts, "optimizer": "sgd", "base_lr": 0.1}
        assert train(write(kind, train=options, data={"val": None}, out=f"parts{parts}"))[0] == 0
    close(tmp_path / "parts4", tmp_path / "parts1")
    one, four = (results(tmp_path / name)["history"][-1]["train_loss"] for name in ("parts1", "parts4"))
    assert four == pytest.approx(one, rel=1e-5)


def test_tokens_computed_once_train_the_same_model(train, write, tmp_path):
    for cache in ("auto", "off"):
        assert train(write(train={"cache_images": cache}, out=cache))[0] == 0
    assert results(tmp_path / "off")["cached_features"] is None
    close(tmp_path / "auto", tmp_path / "off")


def test_a_method_in_the_image_tower_trains_it(train, write, tmp_path):
    everywhere = {"name": "lora", "rank": 4, "targets": ["q", "k"], "stacks": ["image", "text", "fusion", "decoder"]}
    code, _, err = train(write(method=everywhere, train={"steps": 24, "eval_every": 12, "base_lr": 2e-2}))
    assert code == 0, err
    found = results(tmp_path / "out")
    assert found["cached_features"] is None
    first, last = found["history"]
    assert last["train_loss"] < first["train_loss"]
    tensors = adapter(tmp_path / "out")
    inside = {name: tensor for name, tensor in tensors.items() if name.startswith("visual_encoder.")}
    assert set(inside) == {f"visual_encoder.blocks.0.lora.{role}.{factor}" for role in "qk" for factor in "AB"}
    # B starts at zero: what is there has been trained.
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())
    assert len({name.split(".")[0] for name in tensors}) == 4


@pytest.mark.slow
def test_images_that_change_or_do_not_fit_are_not_kept(train, write, tmp_path, monkeypatch):
    # 29 tokens of 48 numbers, four bytes each, for 24 training images: there is room for no others.
    room = 24 * 5 * 48 * 4 / 2**30
    assert train(write(train={"cache_gib": room}, out="room"))[0] == 0
    assert results(tmp_path / "room")["cached_features"] == "the image tower (train)"
    assert train(write(data={"augment": "crop"}, out="crop"))[0] == 0
    assert results(tmp_path / "crop")["cached_features"] is None
    assert train(write(method={"name": "full"}, out="full"))[0] == 0
    assert results(tmp_path / "full")["cached_features"] is None


@pytest.mark.parametrize(
    "method",
    [
        {"name": "prompt_tuning", "length": 3},
        pytest.param({"name": "prefix", "length": 3, "form": "hidden"}, marks=pytest.mark.slow),
        {"name": "prefix", "length": 3, "form": "hidden", "mlp": 8},
        {"name": "lora", "rank": 2, "targets": ["q", "k"], "heads": "shared"},
        [{"name": "serial_adapter", "hidden": 4}, {"name": "classifier"}],
        [{"name": "parallel_adapter", "hidden": 4, "skip": True}, {"name": "classifier", "part": "transform"}],
        pytest.param([{"name": "prompt_tuning", "length": 2}, {"name": "classifier"}], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_method_trains_in_half_precision(train, write, tmp_path, method):
    options = {"precision": "bf16", "steps": 6, "warmup_steps": 0}
    code, _, err = train(write("vqa", method=method, data={"val": None}, train=options))
    assert code == 0, err
    tensors = adapter(tmp_path / "out")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@needs_amx
def test_half_precision_runs_on_the_packed_layers(train, write, monkeypatch):
    """The trainer's autocast leaves products that are in its format anyway to the engine."""
    from fastpeft.native import block

    calls = []
    for name in ("linear", "mlp_branch"):
        function = getattr(block, name)
        monkeypatch.setattr(block, name, lambda *args, _f=function, _n=name: (calls.append(_n), _f(*args))[1])
    code, _, err = train(
        write("captions", data={"val": None}, train={"precision": "bf16", "steps": 1, "warmup_steps": 0})
    )
    assert code == 0, err
    # Every block of the three stacks, in the step and in the evaluation's searches.
    assert calls.count("mlp_branch") >= 2 * 7 and calls.count("linear") >= 2 * 2 * 7


@pytest.mark.parametrize("zero", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3])
def test_zero_stages_give_the_same_adapter_on_one_rank(train, write, tmp_path, zero):
    method = [{"name": "prefix", "length": 2, "form": "hidden"}, {"name": "classifier"}]
    for stage in (0, zero):
        assert train(write(method=method, train={"zero": stage}, out=f"zero{stage}"))[0] == 0
    close(tmp_path / f"zero{zero}", tmp_path / "zero0")


@pytest.mark.parametrize("zero, offload", [pytest.param(1, "optimizer", marks=pytest.mark.slow), (3, "all")])
def test_what_is_kept_in_the_hosts_memory_changes_nothing(train, write, tmp_path, monkeypatch, zero, offload):
    import deepspeed

    engines = {}
    initialize = deepspeed.initialize

    def seen(**arguments):
        found = initialize(**arguments)
        engines[where] = arguments["config"]["zero_optimization"], found[0]
        return found

    monkeypatch.setattr(deepspeed, "initialize", seen)
    for where in ("none", offload):
        assert train(write(train={"zero": zero, "offload": where, "steps": 5}, out=where))[0] == 0
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    places = ["offload_optimizer"] + ["offload_param"] * (offload == "all")
    kept, engine = engines[offload]
    assert {key: value for key, value in kept.items() if "offload" in key} == dict.fromkeys(places, host)
    assert engine.zero_offload_optimizer().device == "cpu"
    assert (engine.zero_offload_param() is not None) == (offload == "all")
    kept, engine = engines["none"]
    assert not any("offload" in key for key in kept) and engine.zero_offload_optimizer() is None
    close(tmp_path / offload, tmp_path / "none", rtol=1e-6)


@pytest.mark.slow
def test_a_run_goes_on_at_another_stage(train, write, tmp_path, monkeypatch):
    options = {"steps": 6, "checkpoint_every": "1 step"}
    assert train(write(train=options, out="whole"))[0] == 0
    folder = write(train=options | {"zero": 3}, out="cut")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(Killed):
            train(folder)
    code, out, err = train(write(train=options | {"zero": 1}, out="cut"))
    assert code == 0 and "resuming  after step 3" in out, err
    close(tmp_path / "cut", tmp_path / "whole")


def test_the_schedule_is_the_studys(train, write, monkeypatch):
    seen = []
    step = Stepper.step
    monkeypatch.setattr(
        Stepper, "step", lambda self: (seen.append(self.optimizer.param_groups[0]["lr"]), step(self))[1]
    )
    # 24 questions in batches of 8: three steps an epoch; a warm-up of 8 * 0.5 = 4 steps from 0.1 to 1.
    options = {
        "epochs": 3,
        "steps": None,
        "warmup_steps": 8,
        "warmup_by_ratio": True,
        "warmup_lr": 0.1,
        "min_lr": 0.2,
        "base_lr": 1.0,
        "optimizer": "sgd",
    }
    code, _, err = train(write("vqa", data={"data_ratio": 0.5, "val": None}, train=options))
    assert code == 0, err
    expected = [0.325, 0.55, 0.775, 1.0, 1.0, 0.92360680, 0.72360680, 0.47639320, 0.27639320]
    assert seen == pytest.approx(expected)


@pytest.mark.slow
def test_the_prompt_is_seen_on_one_route_and_not_on_the_other(train, write, tmp_path):
    found = {}
    for route in ("fused", "image"):
        for prompt in ("a picture of", "what is it"):
            name = f"{route}{len(prompt)}"
            code, out, _ = train(write(data={"route": route, "prompt": prompt}, train={"steps": 2}, out=name))
            assert code == 0
            assert ("parameters of text encoder and fusion stay as they are" in out) == (route == "image")
            found[route, prompt] = results(tmp_path / name)["history"][-1]["train_loss"]
    assert found["fused", "a picture of"] != found["fused", "what is it"]
    assert found["image", "a picture of"] == found["image", "what is it"]


@pytest.mark.parametrize("zero", [0, 1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (2, 3))])
def test_what_the_route_leaves_out_stays_as_it_is(train, write, tmp_path, zero):
    options = {"zero": zero, "weight_decay": 0.5, "base_lr": 0.1}
    config = write(data={"route": "image", "val": None}, train=options)
    code, _, err = train(config)
    assert code == 0, err
    before = captioning.prepare(load_config(config), "run.yaml")[0].build().state_dict()
    tensors = adapter(tmp_path / "out")
    same = {name for name, tensor in tensors.items() if torch.equal(tensor, before[name])}
    idle = {name for name in tensors if name.startswith(("text_encoder.", "fusion_encoder."))}
    assert same == idle and idle and idle < set(tensors)
    trained = sum(tensor.numel() for name, tensor in tensors.items() if name not in idle)
    assert results(tmp_path / "out")["trained_parameters"] == trained


@pytest.mark.parametrize("most", [8, 25])
def test_tokens_of_a_step_are_counted_once_a_caption(write, monkeypatch, most):
    task, _ = captioning.prepare(load_config(write(data={"max_length": most})), "run.yaml")
    dataset, counted = task.splits["train"].dataset, []
    kind = captioning.Captioning.__new__(captioning.Captioning)
    kind.task = task
    lengths = task.tokenizer.lengths
    monkeypatch.setattr(task.tokenizer, "lengths", lambda texts: (counted.extend(texts), lengths(texts))[1])
    for indices in ([0, 1, 2, 0], [2, 5, 1], list(range(len(dataset)))):
        _, mask = task.tokenizer([dataset[index].caption for index in indices], most)
        assert kind.units([(0, index) for index in indices]) == int(mask[:, 1:].sum())
    assert len(counted) == len(dataset)
    # Captions of different lengths, all of which are cut off or none.
    assert mask.all() == (most == 8)


@pytest.mark.slow
def test_loader_processes_change_nothing(train, write, tmp_path):
    for workers in (0, 2):
        data = {"workers": workers, "augment": "crop_flip", "val": None}
        assert train(write(data=data, out=f"workers{workers}"))[0] == 0
    plain = adapter(tmp_path / "workers0")
    for name, tensor in adapter(tmp_path / "workers2").items():
        assert torch.equal(tensor, plain[name])


@pytest.mark.parametrize(
    ("kind", "overrides", "expected"),
    [
        (
            "captions",
            ["data.name=coco_captoin"],
            "data.name: unknown data 'coco_captoin'; did you mean 'coco_caption'?",
        ),
        ("captions", ["eval.metric=cidre"], "eval.metric: input should be 'cider'"),
        ("captions", ["eval.metric=meteor"], "eval: eval.metrics must have eval.metric, 'meteor', among them"),
        ("vqa", ["eval.metric=bleu"], "eval.metric: input should be 'accuracy', got 'bleu'"),
        ("captions", ["train.epochs=3"], "train: give train.epochs or train.steps, and not both"),
        ("captions", ["train.warmup_steps=4"], "train.warmup_steps (4) must be below train.steps (4)"),
        ("captions", ["train.checkpoint_every=1 epoch"], "with train.steps give checkpoint_every in steps"),
        ("captions", ["model.sizes.withd=3"], "model.sizes.withd: mPLUG has no such size; did you mean 'width'?"),
        ("captions", ["model.sizes.width=33"], "model: width must be a positive multiple of its 4 heads, got 33"),
        ("captions", ["model.sizes.vocab_size=99"], "the model 99; both must be of one vocabulary"),
        ("captions", ["model.name=mplug_base"], "model: vocab: "),
        ("captions", ["model.name=vit_base"], "model.name: input should be 'mplug_base', 'mplug_large' or 'mplug'"),
        ("captions", ["model.checkpoint=/absent.pth"], "model: "),
        ("captions", ["model.vocab=/absent.txt"], "model: /absent.txt: the vocabulary cannot be read"),
        ("captions", ["data.root=/absent"], "are missing"),
        ("captions", ["data.train=/absent.json"], "data: /absent.json: no such file"),
        ("captions", ["data.data_ratio=0"], "data.data_ratio: input should be greater than 0"),
        ("vqa", ["data.template=Question"], "data.template: expected study, original, or a text with {question}"),
        ("vqa", ["data.root={vg: there}"], "data: "),
        ("vqa", ["data.ocrs=true"], "data.ocrs: unknown key; did you mean 'ocr'?"),
        ("captions", ["train.batch_size=9", "train.grad_accumulation=2"], "9 samples cannot be dealt evenly"),
        ("captions", ["train.offload=all"], "train.offload 'all' goes with train.zero 3, got 0"),
        ("captions", ["train.lr={prefix: 1}"], "train.lr.prefix: no such parameter group; this run trains: lora"),
        ("captions", ["method={name: lora, stacks: [txet]}"], "method: "),
        ("captions", ["data.route=image", "method={name: lora, stacks: [text]}"], "data.route 'image' runs neither"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_run(train, write, tmp_path, kind, overrides, expected):
    code, _, err = train(write(kind), *overrides)
    assert code == 2 and expected in one_line(err)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_an_entry_without_a_field_is_named(train, write, tmp_path, squares):
    entries = json.loads((squares / "vqa_train.json").read_text())
    del entries[3]["answer"]
    (tmp_path / "bad.json").write_text(json.dumps(entries))
    code, _, err = train(write("vqa", data={"train": str(tmp_path / "bad.json")}))
    assert code == 2 and f"{tmp_path / 'bad.json'}: entry 3" in one_line(err) and "answer" in err


def test_accuracy_by_type_where_the_official_annotations_are_given(train, write, tmp_path, squares):
    entries = json.loads((squares / "vqa_test.json").read_text())
    annotations = []
    for entry in entries:
        color = entry["question"].startswith("What")
        answers = [{"answer_id": 1 + number, "answer": text} for number, text in enumerate(entry.pop("answer"))]
        kinds = {"question_type": "what color" if color else "where", "answer_type": "other" if color else "place"}
        annotations.append({"question_id": entry["question_id"], "image_id": 1, "answers": answers} | kinds)
    (tmp_path / "test.json").write_text(json.dumps(entries))
    (tmp_path / "annotations.json").write_text(json.dumps({"annotations": annotations}))
    data = {"test": str(tmp_path / "test.json"), "annotations": {"test": str(tmp_path / "annotations.json")}}
    data |= {"answer_list": answer_list(tmp_path, *EVERY_ANSWER, "teal")}
    code, _, err = train(write("vqa", data=data, method=LEARNING, train={"steps": 20, "base_lr": 2e-2}))
    assert code == 0, err
    said = {e["question_id"]: e["answer"] for e in json.loads((tmp_path / "out/predictions/test.json").read_text())}
    shares = {"other": [], "place": []}
    for annotation in annotations:
        same = sum(answer["answer"] == said[annotation["question_id"]] for answer in annotation["answers"])
        # Answers here are given by eight and two of ten, or by all.
        shares[annotation["answer_type"]].append({0: 0.0, 2: 0.6, 8: 1.0, 10: 1.0}[same])
    means = {kind: sum(values) / len(values) for kind, values in shares.items()}
    scores = results(tmp_path / "out")["test_scores"]
    assert scores == pytest.approx(
        {"accuracy": (means["other"] + means["place"]) / 2}
        | {f"accuracy_{kind}": value for kind, value in means.items()}
    )
    assert results(tmp_path / "out")["test_accuracy"]["last"] == scores["accuracy"] > 0
    table = json.loads((tmp_path / "out/predictions/test_accuracy.json").read_text())
    assert table["perAnswerType"] == {kind: round(100 * value, 2) for kind, value in means.items()}
    assert table["perQuestionType"].keys() == {"what color", "where"}
    assert not (tmp_path / "out/predictions/val_accuracy.json").exists()


def test_annotations_that_lack_a_question_are_told_before_training(train, write, tmp_path, squares):
    annotation = {"question_id": 10, "answers": [{"answer_id": 1, "answer": "red"}]}
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps({"annotations": [annotation]}))
    code, _, err = train(write("vqa", data={"annotations": {"val": str(path)}}))
    where = f"{squares / 'vqa_val.json'}: entry 1 (question_id 11)"
    assert code == 2 and f"data: {path}: has no annotation of {where}" in one_line(err)
    code, _, err = train(write("vqa", data={"annotations": {"val": str(path)}, "val": None}))
    assert code == 2 and "data.annotations.val goes with data.val" in one_line(err)


@pytest.fixture
def no_java(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    ptb.java.cache_clear()
    yield
    monkeypatch.undo()
    ptb.java.cache_clear()


@pytest.mark.parametrize(
    "settings, expected",
    [
        (
            {"tokenizer": "java"},
            "tokenizer: 'java' needs Java, and no 'java' that runs was found; give eval.tokenizer=pyt",
        ),
        ({"metric": "meteor", "metrics": ["meteor"]}, "metric: METEOR needs Java, and no 'java' that runs was found"),
    ],
    ids=("tokenizer", "metric"),
)
def test_a_missing_java_is_told_before_training(train, write, tmp_path, no_java, settings, expected):
    code, _, err = train(write(eval=settings))
    assert code == 2 and f"eval: {expected}" in one_line(err)
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize("split", ["val", "test"])
def test_captions_without_a_word_are_told_before_training(train, write, tmp_path, squares, split):
    images = json.loads((squares / "captions.json").read_text())["images"]
    for image in [image for image in images if image["split"] == split][:2]:
        image["sentences"] = [{"raw": "."}]
    path = tmp_path / "wordless.json"
    path.write_text(json.dumps({"images": images}))
    config = write(data={split: str(path), f"{split}_size": 2})
    code, _, err = train(config)
    assert code == 2 and f"data: {path}: {split}: captions: no reference has a word to score by" in one_line(err)
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_question_that_cannot_be_scored_is_named_before_training(train, write, tmp_path, squares, split):
    entries = json.loads((squares / f"vqa_{split}.json").read_text())
    del entries[3]["answer"]
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(entries))
    code, _, err = train(write("vqa", data={split: str(path)}))
    assert code == 2 and f"data: {path}: entry 3 (question_id 13): has no field 'answer'" in one_line(err)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_test_without_any_answer_is_not_scored(train, write, tmp_path, squares):
    entries = json.loads((squares / "vqa_test.json").read_text())
    for entry in entries:
        del entry["answer"]
    (tmp_path / "test.json").write_text(json.dumps(entries))
    code, _, err = train(write("vqa", data={"test": str(tmp_path / "test.json")}))
    assert code == 0, err
    assert results(tmp_path / "out")["test_accuracy"]["last"] is None
    assert len(json.loads((tmp_path / "out" / "predictions" / "test.json").read_text())) == 12


def test_an_image_that_is_missing_or_broken_is_named(train, write, tmp_path, squares):
    entries = json.loads((squares / "vqa_train.json").read_text())
    entries[5]["image"] = "train2014_img/nowhere.png"
    (tmp_path / "missing.json").write_text(json.dumps(entries))
    code, _, err = train(write("vqa", data={"train": str(tmp_path / "missing.json")}))
    assert code == 2 and "nowhere.png" in one_line(err)
    folder = squares / "train2014_img"
    whole = (folder / entries[5]["image"].rpartition("/")[2]).parent
    broken = whole / "broken.png"
    broken.write_bytes((whole / "train_000.png").read_bytes()[:60])
    entries[5]["image"] = "train2014_img/broken.png"
    (tmp_path / "broken.json").write_text(json.dumps(entries))
    code, _, err = train(write("vqa", data={"train": str(tmp_path / "broken.json")}))
    assert code == 1 and "broken.png" in one_line(err)


def test_a_score_that_cannot_be_computed_ends_the_run(train, write, monkeypatch):
    def failing(self, split, texts, folder):
        raise fastpeft.FastPEFTError("no scorer")

    from fastpeft.trainer.mplug.captioning import Captioning

    monkeypatch.setattr(Captioning, "score", failing)
    code, _, err = train(write())
    assert code == 1 and "no scorer" in one_line(err)


def test_ranks_that_search_together_call_the_decoder_equally_often(train, write, monkeypatch):
    from fastpeft.trainer.mplug import work

    calls = []
    decode = MPlug.decode
    monkeypatch.setattr(MPlug, "decode", lambda self, *rest: (calls.append(1), decode(self, *rest))[1])
    monkeypatch.setattr(MPlugWork, "_together", True)
    assert issubclass(work.Lockstep, object)
    code, _, err = train(write(data={"val": None}, method=LEARNING, train={"steps": 20, "base_lr": 3e-2}))
    assert code == 0, err
    # Six test images in batches of four; six tokens at most.
    assert len(calls) == 2 * 6


def test_ranks_that_choose_together_call_the_decoder_equally_often(train, write, tmp_path, monkeypatch):
    from fastpeft.models.mplug import generation

    calls = []
    decode = MPlug.decode
    monkeypatch.setattr(MPlug, "decode", lambda self, *rest: (calls.append(1), decode(self, *rest))[1])
    monkeypatch.setattr(MPlugWork, "_together", True)
    # Of a batch of eight, two examples at once.
    monkeypatch.setattr(generation, "_ROWS", 2 * len(EVERY_ANSWER))
    data = {"val": None, "answer_list": answer_list(tmp_path, *EVERY_ANSWER)}
    code, _, err = train(write("vqa", data=data, eval={"batch_size": 8}))
    assert code == 0, err
    # Twelve questions: the second batch has four, and calls as often as the first. First tokens, then the others.
    assert len(calls) == 2 * 4 * 2
