"""Runs beside a search and its final runs: training sets of other sizes, FT-then-PT, losses by epoch, ensembles."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("optuna")

from bench.tables import curves, study
from bench.tables.__main__ import main
from bench.tables.ensemble import EnsembleJob, InTurn, Together
from bench.tables.errors import TableError
from bench.tables.experiment import Experiment
from bench.tables.job import Backbone
from bench.tables.papers import tables
from bench.tables.protocol import ROWS, Protocol, batch_size, method
from bench.tables.results import FIELDS, LATER, Results
from bench.tables.spec import Request
from bench.tables.strategies import CURVE, AfterTuning, Curve
from bench.tables.tasks import find
from bench.tables.training_set import DEFAULT, ONE_SHOT, TrainingSet, pool_of
from bench.tables.vpt_or_ft import FT, FT_THEN_PT, LORA, MIXED, VPT, experiments
from fastpeft.config import Config
from fastpeft.trainer.loop import DivergedError

QUICK = Protocol(2, 1, True, (42, 44))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of a backbone's weights."""
    from safetensors.torch import save_file

    from fastpeft.models.build import build_model

    torch.manual_seed(0)
    model = build_model("test_vit", 4, 32, weights="random")
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file({name: tensor for name, tensor in model.state_dict().items() if "head" not in name}, path)
    return path


@pytest.fixture
def backbone(weights):
    return Backbone("test_vit", str(weights), 32)


def request(vtab, tmp_path, name="vptft-1", backbone=None, **options) -> Request:
    spec = tables()[name]
    given = backbone or Backbone("vit_base_patch16_224", None, 224)
    return Request(spec, spec.rows, {"main": given}, find(vtab)[0], vtab, tmp_path / "out", **options)


def command(name, vtab, out, weights, *more):
    place = ["--backbone", f"test_vit@{weights}", "--image-size", "32", "--data", str(vtab), "--out", str(out)]
    return [name, *place, "--quick", "--epochs", "2", "--tasks", "eurosat", *more]


def test_names_and_fields_of_training_sets(vtab):
    folder = vtab / "eurosat"
    assert DEFAULT.name == TrainingSet(800).name == TrainingSet(fraction=1.0).name == ""
    assert TrainingSet(800).fields(folder) == {}
    assert TrainingSet(400).name == "n_train=400" and ONE_SHOT.name == "one-shot"
    assert TrainingSet(400).fields(folder) == {"train_size": 400, "val_size": 100, "draw": "random"}
    assert TrainingSet(fraction=0.1).fields(folder) == {"train_fraction": 0.1, "draw": "random"}
    assert TrainingSet(8).lacking(folder) == "" and ONE_SHOT.lacking(folder) == ""
    assert TrainingSet(16).lacking(folder) == "20 images are needed, and there are 16"
    (folder / "pool4.txt").write_text("images/0.png 0\n" * 4)
    assert TrainingSet(16).lacking(folder) == ""
    assert TrainingSet(16).fields(folder)["pool"] == "pool4.txt" == pool_of(folder)
    (folder / "pool5.txt").write_text("images/0.png 0\n" * 4)
    with pytest.raises(TableError, match=r"found pool4\.txt, pool5\.txt"):
        pool_of(folder)


def test_a_result_file_of_an_earlier_version_is_brought_up_to_date(tmp_path):
    old = [name for name in FIELDS if name not in LATER]
    values = {name: f"{name}0" for name in old} | {"seed": "0", "accuracy": "0.25", "point": "base_lr=1"}
    results = Results(tmp_path / "results.csv")
    results.path.write_text(",".join(old) + "\n" + ",".join(values[name] for name in old) + "\n")
    (row,) = results.rows()
    assert all(row[name] == "" for name in ("setting", "train_size", "saved_mb"))
    assert row["accuracy"] == "0.25" and row["task"] == "task0" and tuple(row) == FIELDS
    another = dict.fromkeys(FIELDS, "1") | {"point": "base_lr=2"}
    results.add(another)
    assert results.path.read_text().splitlines()[0] == ",".join(FIELDS)
    assert results.rows() == [row, another]


def test_the_papers_strategies(vtab, tmp_path):
    own = {}
    for one in experiments(request(vtab, tmp_path)):
        own.setdefault(one.task, {})[one.row.name] = one
    assert list(own) == ["cifar100", "eurosat"] and list(own["eurosat"]) == ["full", "vpt", "mixed", "ft-then-pt"]
    # Lengths are those of the VPT paper's Table 13; batches of 64 however long.
    assert own["cifar100"]["vpt"].row.searched == {"length": (10,)}
    prompts = own["eurosat"]["vpt"]
    assert prompts.row.searched == {"length": (100,)} and len(prompts.points) == 40
    assert batch_size(prompts.row, {"length": 100}) == 64 and own["eurosat"]["full"].row.batch_size == 128
    assert method(own["eurosat"]["mixed"].row, {"length": 100}) == [{"name": "full"}, {"name": "vpt", "length": 100}]
    assert {own["eurosat"][name].row.optimizer for name in ("mixed", "ft-then-pt")} == {"sgd"}
    after = own["eurosat"]["ft-then-pt"]
    assert isinstance(after, AfterTuning) and after.size == 16 + 40 + 5
    assert after.tuning.search() == own["eurosat"]["full"].search(), "the search is one and the same"


def test_every_run_is_a_configuration(vtab, tmp_path):
    for row in (FT, VPT, MIXED, FT_THEN_PT, LORA):
        for images in (DEFAULT, ONE_SHOT, TrainingSet(8), TrainingSet(fraction=0.5)):
            one = Experiment(Backbone("test_vit", None, 32), vtab, "eurosat", "eurosat", row, QUICK, images=images)
            for stage in ("search", "final", CURVE):
                job = one.job(stage, one.points[0], 42)
                config = job.config(tmp_path, tmp_path if row is FT_THEN_PT else None)
                assert isinstance(config, Config) and config.train.select == "last"
                assert config.train.eval_every == (stage == CURVE)
                assert config.train.head_init == ("keep" if row is FT_THEN_PT else "vpt")
                assert config.data.protocol == ("search" if stage == "search" else "final")
                assert job.key()["setting"] == images.name and images.name in str(job)


def test_lengths_of_other_backbones_are_searched(vtab, tmp_path):
    given = Backbone("swin_base_patch4_window7_224", None, 224)
    own = {one.row.name: one for one in tables()["vptft-7"].plan(request(vtab, tmp_path, "vptft-7", given))}
    assert own["vpt"].row.searched == {"length": (50, 10, 5, 1)} and own["vpt"].row.batch_size == 80


def done(results, *batches):
    """Rows for runs that are not trained here, of which the last has the highest accuracy."""
    for jobs in batches:
        for number, job in enumerate(jobs):
            results.add(dict.fromkeys(FIELDS, "1") | job.key() | {"accuracy": f"0.{number:03}"})


def test_prompts_begin_with_what_the_best_full_fine_tuning_left(vtab, tmp_path):
    where = (Backbone("test_vit", None, 32), vtab, "eurosat", "eurosat")
    tuning = Experiment(*where, FT, QUICK, final=False)
    one = AfterTuning(*where, dataclasses.replace(FT_THEN_PT, searched={"length": (2,)}), QUICK, tuning=tuning,
                      runs=tmp_path / "runs")  # fmt: skip
    results, seen = Results(tmp_path / "results.csv"), []
    for jobs in one.batches(results):
        seen.append(jobs)
        done(results, jobs)
    assert [len(jobs) for jobs in seen] == [2, 2, 1, 1] and sum(map(len, seen)) == one.size
    best = seen[0][-1].point
    assert all(job.start == tuning.job("search", dict(best), 0) for job in seen[1])
    assert [(job.start.stage, job.start.seed) for (job,) in seen[2:]] == [("final", 42), ("final", 44)]
    assert all(job.start.point == best for jobs in seen[2:] for job in jobs)
    (job,) = list(Curve(one).batches(results))[-1]
    assert (job.stage, job.start.stage, job.start.point) == (CURVE, CURVE, best)


def test_a_tuned_backbone_stays_while_another_study_needs_it(vtab, tmp_path):
    """Two tables with prompts of different lengths begin with one tuned backbone."""
    where = (Backbone("test_vit", None, 32), vtab, "eurosat", "eurosat")
    tuning, results = Experiment(*where, FT, QUICK, final=False), Results(tmp_path / "results.csv")
    done(results, tuning.search())
    first, second, killed = (
        AfterTuning(*where, dataclasses.replace(FT_THEN_PT, searched={"length": (length,)}), QUICK, final=False,
                    tuning=tuning, runs=tmp_path / "runs").batches(results)
        for length in (2, 3, 4)
    )  # fmt: skip
    for batches in (first, second, killed):
        next(batches)
    ours, theirs, _ = next(first), next(second), next(killed)
    tuned = ours[0].start.out(tmp_path / "runs" / "tuned")
    assert tuned == theirs[0].start.out(tmp_path / "runs" / "tuned") and ours[0].point != theirs[0].point
    tuned.mkdir(parents=True)
    assert next(first, None) is None and tuned.is_dir(), "the other study has yet to begin with it"
    killed.close()
    assert tuned.is_dir()
    assert next(second, None) is None and not tuned.exists()
    assert not [path for path in tuned.parent.iterdir() if path.is_dir()]


def test_ft_then_pt_trains_on_a_tuned_backbone_and_tells_its_whole_history(vtab, tmp_path, backbone):
    runs = tmp_path / "out" / "runs"
    where = (backbone, vtab, "eurosat", "eurosat")
    after = Experiment(*where, dataclasses.replace(FT_THEN_PT, searched={"length": (2,)}), QUICK)
    start = Experiment(*where, FT, QUICK).job(CURVE, {"base_lr": 1e-3, "weight_decay": 0.0}, 42)
    job = after.job(CURVE, {"length": 2, "base_lr": 0.1, "weight_decay": 0.0}, 42)
    job = dataclasses.replace(job, start=start)
    row = job.run(runs)
    assert int(row["trained_parameters"]) < int(row["backbone_parameters"]) and row["train_size"] == 16
    lines = curves.read(tmp_path / "out" / "curves")
    for split in ("train", "test"):
        assert [int(line["epoch"]) for line in lines if line["split"] == split] == [1, 2, 3, 4]
    assert {line["method"] for line in lines} == {"ft-then-pt"}
    tuned = start.out(runs / "tuned")
    assert (tuned / "adapter").is_dir(), "it waits for other runs"
    before = (tuned / "results.json").stat().st_mtime_ns
    dataclasses.replace(job, point=(("length", 2), ("base_lr", 1.0), ("weight_decay", 0.0))).run(runs)
    assert (tuned / "results.json").stat().st_mtime_ns == before, "tuned once"
    start.clear(runs / "tuned")
    assert not tuned.exists()


def test_training_sets_of_other_sizes(vtab, tmp_path, backbone):
    sizes = {}
    for images in (TrainingSet(8), ONE_SHOT, TrainingSet(fraction=0.5)):
        one = Experiment(backbone, vtab, "eurosat", "eurosat", ROWS["linear"], QUICK, images=images)
        for stage in ("search", "final"):
            sizes[images.name, stage] = one.job(stage, one.points[0], 42).run(tmp_path / "runs")["train_size"]
    assert sizes == {
        ("n_train=8", "search"): 8, ("n_train=8", "final"): 10, ("one-shot", "search"): 4, ("one-shot", "final"): 8,
        ("fraction=0.5", "search"): 6, ("fraction=0.5", "final"): 8,
    }  # fmt: skip


def test_together_is_one_after_the_other(vtab, tmp_path, backbone):
    row = dataclasses.replace(ROWS["vpt-deep"], searched={"length": (3,)})
    one = Experiment(backbone, vtab, "eurosat", "eurosat", row, QUICK)
    point = {"length": 3, "base_lr": 10.0, "weight_decay": 0.0}
    members = [dataclasses.replace(one.job("final", point, seed), keep=True) for seed in (42, 44, 82, 100, 800)]
    job = EnsembleJob(tuple(members))
    assert job.one_pass and not EnsembleJob((dataclasses.replace(members[0], row=ROWS["full"]),)).one_pass
    found = job.run(tmp_path / "runs")
    folders = [member.out(tmp_path / "runs") / "adapter" for member in members]
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    asked = [kind(folders, torch.device("cpu"), torch.float32)(images) for kind in (Together, InTurn)]
    torch.testing.assert_close(*asked, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(asked[0].sum(-1), torch.ones(6))
    assert found.keys() == set(FIELDS) and found["point"].endswith("members=5;weight_decay=0")
    assert found["stage"] == "ensemble" and 0 <= float(found["accuracy"]) <= 1
    members[0].clear(tmp_path / "runs")
    assert folders[0].is_dir(), "a member is kept for the ensemble"
    job.clear(tmp_path / "runs")
    assert not any(folder.exists() for folder in folders)


def test_an_ensemble_with_a_member_that_diverged(vtab, tmp_path, backbone, monkeypatch):
    one = Experiment(backbone, vtab, "eurosat", "eurosat", ROWS["linear"], QUICK)
    job = EnsembleJob((one.job("final", one.points[0], 42),))

    def diverge(self, runs, features=None):
        raise DivergedError("the loss is nan")

    monkeypatch.setattr(type(job.members[0]), "train", diverge)
    row = job.run(tmp_path)
    assert row.keys() == set(FIELDS) and row["accuracy"] == "0" and row["trained_parameters"] == ""


def test_fig15_from_nothing_and_again_from_its_results(vtab, tmp_path, weights, capsys):
    out = tmp_path / "out"
    asked = command("vpt-fig15", vtab, out, weights, "--seeds", "2", "--methods", "linear")
    assert main(asked) == 0
    stages = [row["stage"] for row in Results(out / "results.csv").rows()]
    assert stages == ["search"] * 2 + ["final"] * 2 + ["ensemble"]
    assert not any(path.name.startswith("eurosat") for path in (out / "runs").iterdir())
    assert {path.name for path in (out / "figures").glob("*.*")} == {"vpt-fig15.svg", "vpt-fig15.png"}
    svg = (out / "figures" / "vpt-fig15.svg").read_text()
    assert "VPT, Fig. 15: test_vit@" in svg and "quick-2" in svg and "ensemble" in svg
    kept = {path.name: path.read_bytes() for path in out.glob("vpt-fig15.*")}
    assert "(82.6†‡" in kept["vpt-fig15.md"].decode() or "‡" in kept["vpt-fig15.md"].decode()
    for path in out.glob("vpt-fig15.*"):
        path.unlink()
    assert main([*asked, "--tabulate"]) == 0
    assert {path.name: path.read_bytes() for path in out.glob("vpt-fig15.*")} == kept
    capsys.readouterr()
    assert main(asked) == 0 and len(Results(out / "results.csv").rows()) == 5


def test_losses_from_nothing_and_again_from_their_files(vtab, tmp_path, weights):
    out = tmp_path / "out"
    asked = command("vptft-fig10", vtab, out, weights, "--methods", "full")
    assert main(asked) == 0
    text = (out / "vptft-fig10.md").read_bytes()
    row = next(line for line in text.decode().splitlines() if line.startswith("| eurosat, full"))
    assert row.count("-") == 0 and row.split("|")[2].strip() == "2"
    (figure,) = (out / "figures").rglob("losses.svg")
    # The test's line is the dashed one.
    assert "stroke-dasharray: 5" in figure.read_text()
    assert main([*asked, "--tabulate"]) == 0 and (out / "vptft-fig10.md").read_bytes() == text


def test_a_table_over_sizes_lists_what_is_too_small(vtab, tmp_path, weights, capsys):
    asked = command("vptft-5", vtab, tmp_path / "out", weights, "--seeds", "1", "--methods", "vpt", "--tabulate")
    results = Results(tmp_path / "out" / "results.csv")
    line = dict.fromkeys(FIELDS, "") | {
        "task": "eurosat", "method": "vpt", "stage": "final", "seed": 42, "backbone": f"test_vit@{weights}",
        "image_size": 32, "protocol": "quick-2", "accuracy": "0.5",
    }  # fmt: skip
    results.add(line)
    results.add(line | {"setting": "n_train=400", "accuracy": "0.25"})
    assert main(asked) == 0
    text = (tmp_path / "out" / "vptft-5.md").read_text()
    parts = text.split("### ")[1:]
    for part, size, row in zip(parts, ("400", "800"), ("| VPT | 25.0 (96.7‡)", "| VPT | 50.0 (96.2‡)"), strict=False):
        assert part.splitlines()[0].endswith(f": {size}") and row in part
    assert len(parts) == 4
    assert "No n_train=5000 of eurosat: 6,250 images are needed, and there are 16." in text


def test_every_table_of_the_paper_lays_out_nothing(vtab, tmp_path, weights, capsys):
    for name in tables():
        if name.startswith("vptft") or name in ("vpt-fig3", "vpt-fig15"):
            assert main(command(name, vtab, tmp_path / "out", weights, "--tabulate")) == 0, name
            assert (tmp_path / "out" / f"{name}.md").is_file() and (tmp_path / "out" / f"{name}.tex").is_file()


def test_a_killed_worker_leaves_what_the_next_goes_on_from(vtab, tmp_path, backbone, monkeypatch):
    where = (backbone, vtab, "eurosat", "eurosat")
    tuning = Experiment(*where, FT, QUICK, final=False)
    one = AfterTuning(*where, dataclasses.replace(FT_THEN_PT, searched={"length": (2,)}), QUICK, tuning=tuning,
                      runs=tmp_path / "runs")  # fmt: skip
    results = Results(tmp_path / "results.csv")
    done(results, tuning.search(), one.search())
    store, trained = study.storage(None, tmp_path), []

    def train(self, runs, features=None):
        trained.append((self.row.name, self.seed))
        raise KeyboardInterrupt

    batches = one.batches(results)
    next(batches), next(batches)
    jobs = next(batches)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(type(jobs[0]), "train", train)
        study.run_all(jobs, results, tmp_path / "runs", store, lambda job: None)
    assert trained == [("ft-then-pt", 42)] and len(results.rows()) == 4
    # The worker is gone, and needs its tuned backbone no more.
    batches.close()
    for jobs in one.batches(results):
        study.run_all(jobs, results, tmp_path / "runs", store, lambda job: None)
    assert len(results.rows()) == 6
    assert not [path for path in (tmp_path / "runs" / "tuned").iterdir() if path.is_dir()], "tuned backbones are gone"
