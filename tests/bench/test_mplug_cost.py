"""mPLUG's steps in little: both implementations do the same on batches as the tasks have them, and rows say all."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from bench import device, generated
from bench.cpu import goals
from bench.cpu.rows import FLOOR, Settings
from bench.mplug_cost import __main__ as command
from bench.mplug_cost import benchmark, rows, steps, tables
from bench.mplug_cost.cases import IMAGES, LITERAL, METHODS, OURS, TASKS, WHO, Case, batch_of, cases
from bench.mplug_cost.floor import floor_of, products_of
from bench.mplug_cost.steps import MPlugStep, agreement, step_of, trained
from bench.tables.errors import TableError
from fastpeft import methods
from fastpeft.config import load_config

ROOT = Path(__file__).resolve().parents[2]
# What the goals are about, and what ends their names.
WHATS = {"speed": "", "saved bytes": "'s"}


def little(task="caption", images="cached", method="lora", **others):
    return Case(task, images, method, **{"batch": 3, "dtype": "fp32", "threads": 1, "tiny": True, **others})


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The folder of a sweep in little: one method, without what takes a process of its own."""
    folder = tmp_path_factory.mktemp("mplug")
    arguments = ["--tiny", "--repeats", "2", "--methods", "lora", "--parts", "steps", "--out", str(folder)]
    assert command.main(arguments) == 0
    return folder


def held(folder, part="steps"):
    return json.loads((folder / "mplug.json").read_text())["parts"][part]


def test_a_case_leaves_nothing_behind(monkeypatch):
    seen = []

    def watched(*asked):
        step = step_of(*asked)
        seen.extend(weakref.ref(one) for one in (step.model, *step.model.parameters()))
        return step

    monkeypatch.setattr(rows, "step_of", watched)
    assert rows.timed(little(), Settings(True, 1, float("inf"), 0.0, True))["saved_bytes"]
    assert len(seen) > 20 and not [type(one()) for one in seen if one() is not None]


# Batches.


def test_captions_have_a_prompt_and_lengths_as_captions_have():
    given = batch_of(Case("caption", "cached", "lora", tiny=True))
    lengths = (given.text != 0).sum(1)
    assert given.text.shape == (8, 16) and lengths.max() == 16 and lengths.min() == 12
    assert given.ids.shape == (8, 4) and given.mask is None and (given.ids == given.ids[0]).all()
    assert (given.text[:, 0] == 101).all() and given.images.shape == (8, 5, 64) and given.images.dtype == torch.bfloat16
    # What is behind an end is padding, and nothing before it is.
    for row, length in zip(given.text, lengths, strict=True):
        assert (row[:length] != 0).all() and not row[length:].any()


def test_questions_are_padded_and_have_one_to_four_answers_whose_weights_sum_to_one():
    given = batch_of(Case("vqa", "given", "lora", tiny=True))
    lengths = given.mask.sum(1)
    assert given.ids.shape == (8, 14) and lengths.min() == 8 and (given.mask == (given.ids != 0)).all()
    assert given.counts.min() == 1 and given.counts.max() == 4 and given.counts.sum() == len(given.text)
    said = (given.text != 0).sum(1) - 1
    assert said.min() == 2 and said.max() == 4 and given.images.shape == (8, 3, 32, 32)
    for part in given.weights.split(given.counts.tolist()):
        assert part.sum() == pytest.approx(1) and (part > 0).all()


def test_a_seed_decides_and_base_is_base():
    first, again, other = (batch_of(little("vqa"), seed) for seed in (1, 1, 2))
    assert torch.equal(first.ids, again.ids) and not torch.equal(first.ids, other.ids)
    config = Case("vqa", "given", "lora").config
    assert (config.width, config.decoder_layers, config.image_tokens) == (768, 12, 257)
    assert config.dropout == config.attention_dropout == 0


# Both implementations.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("task", "images"), [("caption", "given"), ("vqa", "cached")])
def test_both_implementations_have_one_loss_and_one_gradient(task, images, method):
    case = little(task, images, method)
    pair = [step_of(case, who) for who in WHO]
    assert not any(p.eq(0).all() for p in trained(pair[0].model).values())
    apart = agreement(*pair, "fp32")
    assert apart["loss_difference"] < 1e-5 and 0 <= apart["gradient_difference"] < 1e-4
    for step in pair:
        before = {name: p.clone() for name, p in trained(step.model).items()}
        step()
        moved = [name for name, p in trained(step.model).items() if not torch.equal(p, before[name])]
        assert moved == list(before)


def test_models_that_compute_different_things_are_not_compared():
    case = little()
    literal, ours = (step_of(case, who) for who in WHO)
    with torch.no_grad():
        trained(ours.model)["text_decoder.bert.encoder.layer.0.lora.q.B"].mul_(1.5)
    with pytest.raises(TableError, match="of ours to literal is"):
        agreement(literal, ours, "fp32")
    with pytest.raises(TableError, match="train different tensors"):
        agreement(literal, step_of(little(method="serial"), OURS), "fp32")


@pytest.mark.parametrize(("images", "expected"), [("cached", []), ("given", [False])])
def test_the_image_tower_runs_only_where_images_are_given_and_without_gradients(images, expected, monkeypatch):
    step, seen = step_of(little(images=images), OURS), []
    tower = step.model.visual_encoder
    features = tower.forward_features

    def watched(x):
        seen.append(torch.is_grad_enabled())
        return features(x)

    monkeypatch.setattr(tower, "forward_features", watched)
    assert step.forward().requires_grad and seen == expected


# F.


def test_the_floor_has_every_frozen_product_of_the_literal_step():
    case = little("vqa", "given", "serial")
    literal = step_of(case, LITERAL)
    products = products_of(literal)
    linears = [m for m in literal.model.modules() if isinstance(m, torch.nn.Linear) and not m.weight.requires_grad]
    weights = {p.weight.data_ptr() for p in products}
    embedding = literal.model.text_decoder.bert.embeddings.word_embeddings.weight
    assert weights == {m.weight.data_ptr() for m in linears} | {embedding.data_ptr()}
    assert len(products) == len(linears) + 1

    tower = {m.weight.data_ptr() for m in literal.model.visual_encoder.modules() if isinstance(m, torch.nn.Linear)}
    assert not any(p.back for p in products if p.weight.data_ptr() in tower)
    # The first layer's queries, keys and values come before anything trained.
    attention = literal.model.text_encoder.encoder.layer[0].attention
    (first,) = (p for p in products if p.weight.data_ptr() == attention.self.query.weight.data_ptr())
    (second,) = (p for p in products if p.weight.data_ptr() == attention.output.dense.weight.data_ptr())
    assert not first.back and not second.back and first.rows == 3 * 14
    (head,) = (p for p in products if p.weight.data_ptr() == embedding.data_ptr())
    predicted = int((literal.batch.text[:, 1:] != 0).sum())
    assert head.back and head.rows == predicted
    memory = literal.model.text_decoder.bert.encoder.layer[0].crossattention.self.key.weight
    (keys,) = (p for p in products if p.weight.data_ptr() == memory.data_ptr())
    assert keys.rows == len(literal.batch.text) * (5 + 14) and keys.back


def test_the_floor_runs_its_products_forward_and_back():
    literal = step_of(little(), LITERAL)
    products, floor = products_of(literal), floor_of(literal)
    assert floor.operations == sum(2 * p.rows * p.weight.numel() * (1 + p.back) for p in products)
    assert len(floor._products) == sum(1 + p.back for p in products)
    for product, x, y in floor._products:
        made = product(x, y)
        assert made.shape == y.shape and made.isfinite().all()
    floor()


def test_prefixes_are_among_the_rows_of_the_literal_model():
    rows_of = [{p.rows for p in products_of(step_of(little(method=method), LITERAL))} for method in ("lora", "prefix")]
    assert 3 * 4 in rows_of[0] and 3 * (4 + 8) in rows_of[1] and 3 * 4 not in rows_of[1]


# Rows and the command.


def test_a_sweep_has_a_row_a_case_and_then_nothing_left_to_do(swept, capsys):
    found = held(swept)
    assert list(found) == [str(case) for case in cases(["lora"])]
    for row in found.values():
        assert list(row["variants"]) == [FLOOR, *WHO] and row["tiny"]
        assert all(len(figures["turns_ms"]) == 2 and figures["p25_ms"] > 0 for figures in row["variants"].values())
        assert min(row["saved_bytes"].values()) > 0 and row["floor"]["operations"] > 0
        assert 0 < row["gradient_difference"] < 0.15
    assert command.main(["--tiny", "--methods", "lora", "--parts", "steps", "--out", str(swept)]) == 0
    out = capsys.readouterr().out
    assert "[1/" not in out and "in little: none of these figures says anything" in out
    data = json.loads((swept / "mplug.json").read_text())["runs"][0]
    assert data["versions"]["torch"] and data["command"] and data["date"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tiny"], "--tiny says nothing about this machine; give --out"),
        (["--tiny", "--out", "OUT", "--methods", "lroa"], "unknown method 'lroa'; did you mean 'lora'?"),
        (["--tiny", "--out", "OUT", "--tasks", "captions"], "unknown task 'captions'; did you mean 'caption'?"),
        (["--tiny", "--out", "OUT", "--images", "none"], "unknown kind of images 'none'"),
        (["--tiny", "--out", "OUT", "--repeats", "0"], "--repeats must be at least 1, not 0"),
        (["--out", "SWEPT"], "holds rows in little"),
    ],
)
def test_a_request_that_cannot_be_served_is_one_line(arguments, said, swept, tmp_path, capsys):
    arguments = [{"OUT": str(tmp_path), "SWEPT": str(swept)}.get(one, one) for one in arguments]
    before = (swept / "mplug.json").read_text()
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1 and error.startswith("error: ")
    assert (swept / "mplug.json").read_text() == before


def test_a_row_that_disagrees_is_an_error_that_is_tried_again(tmp_path, monkeypatch):
    arguments = ["--tiny", "--repeats", "1", "--methods", "lora", "--tasks", "vqa", "--images", "cached"]
    arguments += ["--parts", "steps", "--out", str(tmp_path)]
    with monkeypatch.context() as patched:
        patched.setattr(steps, "_APART", {"bf16": (-1.0, 0.0)})
        assert command.main(arguments) == 1
    (row,) = held(tmp_path).values()
    assert "loss_difference of ours to literal is" in row["error"] and "variants" not in row
    assert command.main(arguments) == 0
    (row,) = held(tmp_path).values()
    assert "error" not in row and row["variants"][OURS]["median_ms"] > 0


def test_peaks_are_rows_of_both_in_processes_of_their_own(monkeypatch):
    asked = []
    monkeypatch.setattr(rows, "in_subprocess", lambda *given: asked.append(given) or {"peak_bytes": 7})
    case = little("vqa", dtype="bf16")
    made = list(rows.rows([case], Settings(tiny=True), ["peak"]))
    assert [key for _, key, _ in made] == [f"{case}/{who}" for who in WHO]
    assert all(run()["peak_bytes"] == 7 for _, _, run in made)
    module, who, *options = asked[1]
    assert module == "bench.mplug_cost.peak" and who == OURS and "--tiny" in options
    assert options[options.index("--task") + 1] == "vqa" and options[options.index("--batch") + 1] == "3"


def test_a_peak_is_measured(capsys):
    from bench.mplug_cost import peak

    peak.main([OURS, "--task", "caption", "--images", "cached", "--method", "lora", "--batch", "2", "--tiny"])
    assert json.loads(capsys.readouterr().out)["peak_bytes"] >= 0


# Words.


def fabricated(speed=2.0, share=0.5, method=None):
    """Results of all cases; of one method another speed and share than of the others."""
    made = {}
    for case in tables.MAIN:
        fast, kept = (speed, share) if method in (None, case.method) else (2.0, 0.5)
        times = {FLOOR: 100.0, LITERAL: 300.0, OURS: 300.0 / fast}
        variants = {who: {"median_ms": t, "turns_ms": [0.9 * t, t, 1.1 * t]} for who, t in times.items()}
        saved = {LITERAL: 2 << 20, OURS: int(kept * (2 << 20))}
        made[str(case)] = {"variants": variants, "saved_bytes": saved}
    return {"steps": made, "peak": {f"{tables.MAIN[0]}/{OURS}": {"peak_bytes": 5 << 20}}}


def line(parts, start):
    return next(goal for goal in (goal.line(parts) for goal in tables.GOALS) if goal[0].startswith(start))


def test_goals_are_met_by_the_worst_case_alone():
    parts = fabricated(1.5, 0.65, "serial")
    assert line(parts, "serial: speed")[1:] == ("1.50x, the least: caption, cached, serial", "1.4x", "2x", "yes")
    assert line(parts, "serial: saved")[1:] == ("0.65x, the most: caption, cached, serial", "0.6x", "", "no")
    assert line(parts, "lora: speed")[-1] == "yes, the aim too" and line(parts, "lora: saved")[-1] == "yes"
    assert line(fabricated(share=0.65, method="prompt"), "prompt: saved")[-1] == "no"
    assert line(fabricated(0.9), "prompt")[-1] == "no" and line(fabricated(1.0), "prompt")[-1] == "yes"
    del parts["steps"][str(Case("vqa", "given", "lora"))]
    assert line(parts, "lora: speed")[1] == goals.MISSING


def test_tables_say_times_ratios_and_memory():
    parts = fabricated(1.5)
    assert tables.steps(parts)[0] == (str(tables.MAIN[0]), "100", "300", "3.00", "200", "2.00", "1.50")
    assert len(tables.steps(parts)) == len(TASKS) * len(IMAGES) * len(METHODS)
    first, second = tables.memory(parts)[:2]
    assert first[1:] == ("2.0", "1.0", "0.50", goals.MISSING, "5") and second[-1] == goals.MISSING
    other = Case("vqa", "given", "lora", batch=2, threads=1)
    parts["steps"][str(other)] = parts["steps"].pop(str(tables.MAIN[0]))
    assert tables.steps(parts)[-1][0] == str(other)


def test_every_method_has_a_goal_of_its_time_and_of_its_bytes():
    said = {goal.step for goal in tables.GOALS}
    assert said == {f"{method}: {what} over literal{s}" for method in METHODS for what, s in WHATS.items()}


def test_the_documentation_says_which_forms_are_timed_and_not_the_studys():
    apart = {}
    for method, timed in METHODS.items():
        for kind in ("coco_caption", "vqa"):
            fields = load_config(ROOT / "configs" / "mplug" / f"{kind}_{method}.yaml").method
            (other,) = methods.from_dict(fields).parts()
            apart |= {(method, name): value for name, value in vars(other).items() if value != vars(timed())[name]}
    assert apart == {
        ("prompt", "length"): 16,
        ("prefix", "length"): 16,
        ("lora", "heads"): "shared",
        ("parallel", "skip"): True,
    }
    document = generated.PERFORMANCE.read_text()
    assert "`heads: shared`" in document and "`skip: true`" in document and "of length 16 (here 8)" in document


def test_no_row_no_number():
    assert {goal.line({})[1] for goal in tables.GOALS} == {goals.MISSING}


def test_the_documentation_holds_the_committed_results():
    document = generated.PERFORMANCE.read_text()
    part = tables.rendered(generated.committed(tables.FILE))
    assert tables.SECTION.of(document) == part, "run `python -m bench.mplug_cost --write-docs`"
    assert tables.SECTION.replaced(document, part) == document
    run = {"device": "a chip", "cores": 2, "versions": {"torch": "2.0"}, "date": "2026-01-02T03:04:05+00:00"}
    words = tables.rendered({"a-chip": {"runs": [run], "parts": fabricated()}})
    assert words.startswith("a chip, 2 cores; torch 2.0; 2026-01-02; [a-chip/mplug.json]") and "| 2.00x," in words


# As benchmarks of pytest, and on a GPU's program.


def test_patterns_choose_benchmarks():
    assert benchmark.chosen("none") == [] and len(benchmark.chosen("all")) == 20
    assert benchmark.chosen(benchmark.USUAL) == [("caption", "cached", "lora")]
    assert benchmark.chosen("vqa/*/prompt,*/given/prompt")[-1] == ("vqa", "given", "prompt")
    with pytest.raises(TableError, match="unknown step of mPLUG 'vqa/cached/lroa'; did you mean 'vqa/cached/lora'"):
        benchmark.chosen("vqa/cached/lroa")


@pytest.mark.slow
def test_benchmarks_in_little(tmp_path, no_worker):
    path = tmp_path / "then.json"
    asked = ["--bench-mplug", "vqa/cached/lora", "--bench-mplug-tiny", "--bench-turns", "3"]
    run = [sys.executable, "-m", "pytest", "bench/test_mplug.py", "--benchmark-only", *asked, "-q"]
    run += ["-p", "no:cacheprovider", "--benchmark-json", str(path)]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    noted = [one["extra_info"] for one in json.loads(path.read_text())["benchmarks"]]
    assert [one["implementation"] for one in noted] == [FLOOR, *WHO] and noted[1]["ratio"] == 1
    assert "x literal" in done.stdout


def test_benchmarks_have_figures_of_both_and_of_the_floor():
    case = little()
    found = benchmark.measure(case, benchmark.Settings(turns=3))
    assert list(found) == [FLOOR, *WHO] and all(len(figures["turns"]) == 3 for figures in found.values())
    assert found[LITERAL]["ratio"] == 1 and found[OURS]["saved_bytes"] > 0 and found[OURS]["floor_ratio"] > 0
    records = [{"case": "a step", "implementation": OURS, "median_ms": 12.0, "ratio": 0.5}]
    assert "a step" in benchmark.render(records) and "0.50" in benchmark.render(records)


def test_a_broken_step_fails_all_of_its_benchmarks(monkeypatch):
    def broken(*_):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(benchmark, "step_of", broken)
    found = benchmark.measure(little(), benchmark.Settings())
    assert {figures["error"] for figures in found.values()} == {"RuntimeError: no such thing"}


def test_the_program_for_gpus_has_the_same_cases(tmp_path, capsys):
    common = ("--device", "cpu", "--tiny", "--workers", "0", "--turns", "1", "--backends", "reference")
    asked = ("--part", "mplug", "--methods", "mplug-lora", "--out", str(tmp_path / "device.json"))
    assert device.main([*common, *asked]) == 0
    found = json.loads((tmp_path / "device.json").read_text())["parts"]["mplug"]
    assert list(found) == [
        f"mplug-base-tiny/b2/float32/train/{task}/{images}/lora" for images in IMAGES for task in TASKS
    ]
    for row in found.values():
        assert set(row["variants"]) == {"reference", LITERAL} and row["floor"]["median_ms"] > 0
        assert row["apart"]["reference"]["gradient_difference"] < 1e-3
        assert all(figures["saved_bytes"] > 0 for figures in row["variants"].values())
    assert "floor" in capsys.readouterr().out


def test_a_step_is_a_training_step():
    step = step_of(little(), OURS)
    assert isinstance(step, MPlugStep) and step.model.training
    names = {id(p) for group in step.optimizer.param_groups for p in group["params"]}
    assert names == {id(p) for p in trained(step.model).values()}
    with pytest.raises(TableError, match="no implementation 'theirs'"):
        step_of(little(), "theirs")
