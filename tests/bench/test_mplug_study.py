"""The mPLUG study: its protocol against the paper's Table II and the shipped configurations, and runs in small."""

import csv
import dataclasses
import shutil
from pathlib import Path

import pytest

from bench import mplug_study
from bench.mplug_study import __main__ as study_command
from bench.mplug_study import corpora, curves, layouts, plan
from bench.mplug_study.__main__ import RESULTS, run
from bench.mplug_study.job import SCHEMA, Base, MPlugJob
from bench.mplug_study.measured import Cell, cells, reference_size, share
from bench.mplug_study.methods import FULL, TUNINGS
from bench.mplug_study.protocol import CAPTION, VQA, Protocol, of_study
from bench.mplug_study.tables import FIGURES, write
from bench.tables.__main__ import main
from bench.tables.errors import TableError
from bench.tables.results import Results
from fastpeft.config import load_config
from fastpeft.metrics import ptb
from fastpeft.trainer.report import Reporter
from tests.trainer import vl

_ROOT = Path(__file__).resolve().parents[2]
_PRINTED = {"prompt": "prompt-tuning", "prefix": "prefix-tuning", "lora": "lora"}
_PRINTED |= {"serial": "serial-adapter", "parallel": "parallel-adapter"}


def _printed(method: str, task: str) -> dict[str, str]:
    with (_ROOT / "bench" / "papers" / "mplug_peft_table02.csv").open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["method"] == _PRINTED[method] and row["task"] == task]
    return {row["metric"]: row["value"] for row in rows}


@pytest.mark.parametrize("method", _PRINTED)
@pytest.mark.parametrize("kind", [CAPTION, VQA])
def test_protocol_is_table_two(method, kind):
    printed = _printed(method, {CAPTION: "mscoco_caption", VQA: "vqav2"}[kind])
    schedule = of_study(False, 1).schedules[kind]
    assert schedule.rates[method] == (float(printed["highest_lr"]),)
    assert schedule.ratios == tuple(float(share.rstrip("%")) / 100 for share in printed["data_ratio_grid"].split(";"))
    grid = next(value for name, value in printed.items() if name.endswith(("length_grid", "rank_grid", "size_grid")))
    assert schedule.sizes[method] == tuple(map(int, grid.split(";")))
    assert schedule.train["steps" if kind == CAPTION else "epochs"] == int(printed["train_length"])
    if kind == CAPTION:
        assert printed["lr_schedule"] == "linear warm-up from 0 over the first 400 steps, cosine decay to 0"
        assert (schedule.train["warmup_steps"], schedule.train["warmup_lr"], schedule.train["min_lr"]) == (400, 0, 0)
    else:
        assert printed["lr_schedule"] == ("warm-up from 1e-6 over the first 800*data_ratio steps, cosine decay to 1e-6")
        assert schedule.train["warmup_steps"] == 800 and schedule.train["warmup_by_ratio"]
        assert schedule.train["warmup_lr"] == schedule.train["min_lr"] == 1e-6


@pytest.mark.parametrize("method", _PRINTED)
@pytest.mark.parametrize(("kind", "stem"), [(CAPTION, "coco_caption"), (VQA, "vqa")])
def test_runs_are_the_shipped_configurations(method, kind, stem, tmp_path):
    """At the reference size with all of the data a run of the study is the file that users are given."""
    theirs = load_config(_ROOT / "configs" / "mplug" / f"{stem}_{method}.yaml")
    given = theirs.model_dump(mode="json")
    corpus = corpora.Corpus("x", kind, {name: given["data"][name] for name in ("name", "root", "train", "val", "test")})
    base = Base("b", given["model"])
    protocol = of_study(False, 1)
    job = _job(
        base, corpus, protocol, method, TUNINGS[method].reference, rate=protocol.schedules[kind].rates[method][0]
    )
    ours, theirs = job.config(tmp_path).identity(), theirs.identity()
    ignored = {"out", "train.seed", "data.workers"}
    differing = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)} - ignored
    assert not differing, {key: (ours.get(key), theirs.get(key)) for key in differing}


def test_what_computes_a_run_is_not_in_its_key(tmp_path):
    captions = corpora.Corpus("coco", CAPTION, {"name": "coco_caption", "root": "r", "train": "t", "val": "v"})
    questions = corpora.Corpus("vqav2", VQA, {"name": "vqa", "root": "r", "train": "t", "val": "v"})
    base = Base("b", {"name": "mplug_base"})
    for quick, name in ((False, "study"), (True, "quick")):
        usual = of_study(quick, 1)
        parts = of_study(quick, 1, grad_accumulation=4, workers=3)
        python = of_study(quick, 1, tokenizer="python", grad_accumulation=4)
        for corpus, other in ((captions, f"{name}-python"), (questions, name)):
            keys = [_job(base, corpus, protocol, "lora", 8).key() for protocol in (usual, parts, python)]
            assert keys[0] == keys[1] == keys[2] | {"protocol": name} and keys[0]["protocol"] == name
            assert keys[2]["protocol"] == other
        config = _job(base, captions, parts, "lora", 8).config(tmp_path)
        assert (config.train.batch_size, config.train.grad_accumulation, config.data.workers) == (256, 4, 3)
        assert config.eval.tokenizer == "java"
        assert _job(base, captions, python, "lora", 8).config(tmp_path).eval.tokenizer == "python"
        assert "python tokenizer" in python.described and "tokenizer" not in parts.described


@pytest.fixture
def no_java(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    ptb.java.cache_clear()
    yield
    monkeypatch.undo()
    ptb.java.cache_clear()


def test_without_java_the_other_tokenizer_is_named(data, tmp_path, no_java, monkeypatch, capsys):
    monkeypatch.setattr(study_command, "run", lambda *_: None)
    ask = ["--backbone", "mplug_base@f", "--data", str(data), "--out", str(tmp_path / "o")]
    assert main(["mplug-fig5", *ask]) == 2
    said = capsys.readouterr().err
    assert "--tokenizer java needs Java, and no 'java' that runs was found" in said and said.count("\n") == 1
    assert "give --tokenizer python" in said
    assert main(["mplug-fig5", *ask, "--tokenizer", "python"]) == 0
    assert "METEOR is left out: it needs Java" in capsys.readouterr().out
    # Answers have no words to make, and what is there needs no scoring.
    assert main(["mplug-fig4", *ask]) == main(["mplug-fig3", *ask, "--tabulate"]) == 0


def _job(base, corpus, protocol, method, size, *, ratio=1.0, classifier=False, stage="final", seed=1, rate=1e-3):
    return MPlugJob(base, corpus, protocol, TUNINGS[method], size, ratio, classifier, stage, seed, rate)


def test_sweeps_have_every_cell_once():
    protocol, base = of_study(False, 2), Base("b", {"name": "mplug_base"})
    corpus = corpora.Corpus("coco", CAPTION, {"name": "coco_caption"})

    def experiment(method, **sweep):
        return plan.Experiment(base, corpus, protocol, TUNINGS[method], plan.Sweep(**sweep))

    both = experiment("prompt").cells
    # Nine shares at the reference size, seven sizes with all data, one of them both; with and without classifier.
    assert len(both) == len(set(both)) == 2 * (9 + 7 - 1)
    assert {ratio for size, ratio, _ in both if size != 16} == {1.0}
    assert len(experiment("lora", product=True, classifier=(False,)).cells) == 9 * 5
    assert experiment(FULL).cells == [(0, ratio, False) for ratio in protocol.schedules[CAPTION].ratios]
    assert experiment("serial", sizes=(8,), ratios=(0.5,)).cells == [(8, 0.5, False), (8, 0.5, True)]
    assert experiment("prompt").size == 2 * len(both)


def test_a_module_and_the_classifier_are_two_methods():
    assert TUNINGS["lora"].method(4, False) == {"name": "lora", "targets": ["q", "k"], "heads": "shared", "rank": 4}
    assert TUNINGS["serial"].method(16, True) == [{"name": "serial_adapter", "hidden": 16}, {"name": "classifier"}]
    assert TUNINGS[FULL].method(0, False) == {"name": "full"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Coloured squares as COCO and VQAv2 lie in a folder."""
    root = tmp_path_factory.mktemp("data")
    vl.make(root / "coco")
    (root / "coco" / "captions.json").rename(root / "coco" / "dataset_coco.json")
    (root / "vqa").mkdir()
    for split in ("train", "val", "test"):
        (root / "coco" / f"vqa_{split}.json").rename(root / "vqa" / f"vqa_{split}.json")
    return root


def _small() -> Protocol:
    usual = of_study(True, 1)
    train = {"batch_size": 8, "precision": "fp32", "select": "best"}
    captions = dataclasses.replace(
        usual.schedules[CAPTION],
        train={**train, "steps": 4, "eval_every": 2, "checkpoint_every": "2 steps"},
        evaluation={"beams": 1, "min_length": 1, "max_length": 6, "metrics": ["cider"], "tokenizer": "python"},
        data={"route": "fused", "prompt": "a picture of"},
        ratios=(0.5, 1.0), sizes={"prompt": (2, 16), "lora": (2, 8), FULL: (0,)},
        rates={"prompt": (1e-2, 1e-3), "lora": (1e-2,), FULL: (1e-3,)},
    )  # fmt: skip
    questions = dataclasses.replace(
        captions,
        metric="accuracy", title="VQA accuracy", train={**train, "epochs": 1}, data={"template": "study"},
        evaluation={"beams": 1, "max_length": 4}, sizes={"lora": (2,)}, ratios=(0.5, 1.0),
    )  # fmt: skip
    return dataclasses.replace(usual, name="small", schedules={CAPTION: captions, VQA: questions})


def _base(data: Path) -> Base:
    return Base("tiny", vl.config(data / "coco")["model"])


@pytest.fixture(scope="module")
def studied(data, tmp_path_factory):
    """Results of two methods, full fine-tuning beside, on captions and questions."""
    out = tmp_path_factory.mktemp("out")
    results, protocol, there = Results(out / RESULTS, SCHEMA), _small(), corpora.find(data)
    todo = plan.experiments(
        _base(data), [there[CAPTION]], protocol, ["prompt", FULL], plan.Sweep(classifier=(False, True))
    )
    todo += plan.experiments(_base(data), [there[VQA]], protocol, ["lora"], plan.Sweep(classifier=(False,)))
    run(todo, results, out, None, None, Reporter(False))
    return out, results, protocol, todo


def test_runs_are_in_the_results_and_not_done_again(studied, monkeypatch):
    out, results, _, todo = studied
    rows = results.rows()
    assert len(rows) == sum(experiment.size for experiment in todo)
    found = [row for row in rows if row["task"] == "coco" and row["method"] == "prompt"]
    searched = {row["rate"]: float(row["score"]) for row in found if row["stage"] == "search"}
    best = min(searched, key=lambda rate: (-searched[rate], float(rate)))
    assert {row["rate"] for row in found if row["stage"] == "final"} == {best}
    cell = {(row["size"], row["ratio"], row["classifier"]) for row in found if row["stage"] == "final"}
    assert cell == {(size, ratio, c) for size, ratio in (("16", "0.5"), ("16", "1"), ("2", "1")) for c in ("yes", "no")}
    trained = {(row["size"], row["classifier"]): int(row["trained_parameters"]) for row in found}
    # Two prompts' rows for each of the stacks that read text: 14 rows of 32 more than two have.
    assert (trained["16", "no"] - trained["2", "no"]) % (14 * 32) == 0 < trained["16", "no"] < trained["16", "yes"]
    half, whole = (
        next(row for row in found if row["ratio"] == ratio and row["stage"] == "final") for ratio in ("0.5", "1")
    )
    assert 2 * int(half["train_size"]) == int(whole["train_size"])
    monkeypatch.setattr(MPlugJob, "run", lambda *args: pytest.fail("a run that is in the results was begun"))
    run(todo, results, out, None, None, Reporter(False))
    assert results.rows() == rows
    assert not list((out / "runs").glob("*/adapter"))


def test_figures_come_from_the_results_alone(studied, data, tmp_path):
    out, results, protocol, _ = studied
    there = list(corpora.find(data).values())
    first = {}
    for _ in range(2):
        for name in FIGURES:
            write(name, results, there, _base(data), protocol, out)
        made = {path: path.read_bytes() for path in [*out.glob("mplug-*"), *(out / "figures").iterdir()]}
        first = first or made
        assert made == first
    text = (out / "mplug-fig3.md").read_text()
    assert "| method | trained | 50% | 100% |" in text and "prompt-tuning, length 16 and classifier" in text
    assert "Full fine-tuning:" in text and "LoRA" not in text
    assert "step, prompt-tuning" in (out / "mplug-fig6.md").read_text()
    names = {path.name for path in (out / "figures").iterdir()}
    assert {"mplug-fig3-coco.svg", "mplug-fig4-vqav2.png", "mplug-fig5-coco.svg", "mplug-fig6-coco.png"} <= names
    assert "mplug-fig8-coco.png" not in names
    (tmp_path / RESULTS).write_text("task,method\n")
    with pytest.raises(TableError, match="its columns are not those"):
        write("mplug-fig3", Results(tmp_path / RESULTS, SCHEMA), there, _base(data), protocol, tmp_path)


def test_curves_hold_every_evaluation(studied):
    out, results, _, _ = studied
    lines = curves.read(out / curves.FOLDER)
    own = [line for line in lines if (line["method"], line["size"], line["ratio"]) == ("prompt", "2", "1")]
    assert [line["step"] for line in own if line["classifier"] == "no"] == ["2", "4"]
    scores = [float(line["val_score"]) for line in own]
    assert all(0 <= score <= 10 for score in scores)
    finals = [row for row in results.rows() if row["stage"] == "final"]
    assert len({tuple(line[name] for name in SCHEMA.key) for line in lines}) == len(finals)


def test_runs_that_diverged_are_in_no_mean_and_named(studied):
    _, results, _, _ = studied
    rows = results.rows()
    own = [dict(row, seed="42") for row in rows if row["stage"] == "final"]
    broken = dict(own[-1], seed="7", score="0", trained_parameters="")
    found = cells(own, (42,))
    assert found and [cell.scores for cell in cells([*own, broken], (42, 7))] == [cell.scores for cell in found]
    protocol = of_study(quick=True, seeds=1)
    assert layouts.lost(own, protocol) == ""
    said = layouts.lost([*own, broken], protocol)
    assert said.startswith("Runs whose loss was not finite are left out: ") and said.endswith("(1 of 2).")
    # A run with a seed that was not asked for has no part in a cell.
    assert [cell.scores for cell in cells([*own, dict(own[-1], seed="7", score="0.9")], (42,))] == [
        cell.scores for cell in found
    ]
    assert reference_size([cell for cell in found if cell.method == "prompt"], "prompt") == 16
    assert reference_size(found, "prefix") is None


def test_the_usual_size_is_shown_where_all_have_as_many_shares():
    found = [Cell("lora", size, ratio, False, (1.0,), 1, 1) for size in (2, 8, 32) for ratio in (0.1, 1.0)]
    assert reference_size(found, "lora", 8) == 8 and reference_size(found, "lora") == 2
    assert reference_size(found[:5], "lora", 32) == 2


def test_shares_that_are_close_have_names_of_their_own():
    assert [share(ratio) for ratio in (0.001, 0.002, 0.12, 0.125, 0.29, 1)] == [
        "0.1%", "0.2%", "12%", "12.5%", "29%", "100%",
    ]  # fmt: skip


def test_data_that_lack_a_file_are_named(data, tmp_path):
    with pytest.raises(TableError, match="no such folder"):
        corpora.find(tmp_path / "none")
    with pytest.raises(TableError, match="neither captions nor questions; expected coco/dataset_coco"):
        corpora.find(tmp_path)
    shutil.copytree(data / "vqa", tmp_path / "vqa")
    (tmp_path / "vqa" / "vqa_val.json").unlink()
    with pytest.raises(TableError, match=r"vqa_val\.json: missing"):
        corpora.find(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["mplug-fig3", "--out", "o"], "--backbone is missing"),
        (["mplug-fig3", "--out", "o", "--backbone", "mplug_base@f"], "--data is missing"),
        (["mplug-fig3", "--out", "o", "--backbone", "mplug_bas", "--data", "d"], "did you mean 'mplug_base'"),
        (["mplug-fig3", "--out", "o", "--methods", "lor"], "unknown method 'lor'; did you mean 'lora'"),
        (["mplug-fig3", "--out", "o", "--backbone", "mplug", "--data", "d", "--ratios", "2"], "--ratios are shares"),
        (["mplug-fig3", "--out", "o", "--backbone", "mplug", "--data", "d"], "d: no such folder"),
        (["mplug-fig3", "--out", "o", "--backbone", "mplug", "--data", "d", "--grad-accumulation", "3"], "must divide"),
        (["mplug-fig3", "--out", "o", "--backbone", "mplug", "--data", "d", "--workers", "-1"], "--workers must be"),
        (["mplug-fig33", "--out", "o"], "did you mean 'mplug-fig3'"),
    ],
)
def test_requests_that_cannot_be_served_get_a_line(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_every_name_has_a_figure():
    assert tuple(FIGURES) == mplug_study.NAMES
