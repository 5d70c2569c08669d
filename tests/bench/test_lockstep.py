"""Runs side by side on kept features: every one ends as it does alone."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("optuna")
pytest.importorskip("deepspeed")

import torch

from bench.tables import lockstep, study, together
from bench.tables.job import Backbone, Job
from bench.tables.protocol import ROWS, Protocol
from bench.tables.results import Results
from fastpeft.trainer import features as trainer_features
from fastpeft.trainer import launch, session
from fastpeft.trainer.feature_store import FeatureStore
from fastpeft.trainer.report import Reporter

BACKBONE = Backbone("test_vit", "random", 32)
# Of a row: what circumstances decide.
VARIES = ("seconds", "ms_per_image", "peak_memory_mb")


@pytest.fixture(autouse=True)
def one_thread():
    # A product is rounded by how it is divided among threads, and other tests may have changed their number.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def jobs(vtab, row="linear", stage="search", points=None, seeds=(0,), batch=2048, epochs=4):
    row = dataclasses.replace(ROWS[row], batch_size=batch)
    points = points or ((50.0, 0.01), (1.0, 0.0), (0.05, 0.0001))
    protocol = Protocol(epochs, 2, False, (42, 44))
    return [
        Job(BACKBONE, vtab, "eurosat", "eurosat", row, protocol, stage, point, seed)
        for point in ((("base_lr", rate), ("weight_decay", decay)) for rate, decay in points)
        for seed in seeds
    ]


def alone(job, runs, features=None, cache="auto"):
    """The trainer's outcome of a run, and the tensors that it ended with."""
    from safetensors.torch import load_file

    config = job.config(job.out(runs))
    config = config.model_copy(update={"train": config.train.model_copy(update={"cache_features": cache})})
    outcome = session.run(config, str(job), False, Reporter(False), launch.find_ranks(), features)
    last = max((job.out(runs) / "checkpoints").glob("step-*"))
    tensors = load_file(last / "tensors.safetensors")
    return outcome, {
        name.partition("/")[2]: value for name, value in tensors.items() if name.startswith(("param/", "buffer/"))
    }


def train(todo, runs, features=None):
    """The outcomes of a group, or None."""
    found = {}
    configs = [job.config(job.out(runs)) for job in todo]
    done = lockstep.train(configs, "test", launch.find_ranks(), features, runs / "together", found.__setitem__)
    return [found[index] for index in range(len(todo))] if done else None


def side_by_side(todo, runs, monkeypatch, features=None):
    """The outcomes of a group, and the tensors that each run ended with."""
    ended = {}
    evaluate = lockstep._evaluate

    def spy(work, these, *rest):
        ended.update(
            {run.index: {n.removeprefix("model."): t.clone() for n, t in run.tensors.items()} for run in these}
        )
        return evaluate(work, these, *rest)

    monkeypatch.setattr(lockstep, "_evaluate", spy)
    return train(todo, runs, features), [ended[index] for index in range(len(todo))]


@pytest.mark.parametrize("row", ["linear", "mlp-3", "partial-1"])
def test_every_run_of_a_search_ends_with_the_bits_that_it_has_alone(vtab, tmp_path, monkeypatch, row):
    # Batches of 5 of 12 images: the last is smaller.
    todo = jobs(vtab, row, batch=5)
    outcomes, tensors = side_by_side(todo, tmp_path, monkeypatch)
    for job, outcome, ended in zip(todo, outcomes, tensors, strict=True):
        single, expected = alone(job, tmp_path / "alone")
        assert ended.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(ended[name], tensor), f"{job}: {name}"
        assert outcome["history"] == single["history"]
        ours, theirs = job.row_of(outcome, tmp_path / "runs"), job.row_of(single, tmp_path / "runs")
        assert {k: v for k, v in ours.items() if k not in VARIES} == {
            k: v for k, v in theirs.items() if k not in VARIES
        }
    assert not torch.equal(tensors[0]["head.weight"], tensors[1]["head.weight"])


@pytest.fixture
def weights(tmp_path):
    """The backbone as a file, so that no seed draws it."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(5)
    state = timm.create_model("test_vit", num_classes=0, img_size=32).state_dict()
    save_file(state, tmp_path / "vit.safetensors")
    return str(tmp_path / "vit.safetensors")


def of_file(todo, weights):
    backbone = dataclasses.replace(BACKBONE, weights=weights)
    return [dataclasses.replace(job, backbone=backbone) for job in todo]


@pytest.mark.parametrize("pretrained", [True, False])
def test_final_runs_of_several_seeds(vtab, tmp_path, monkeypatch, weights, pretrained):
    todo = jobs(vtab, "mlp-3", "final", points=((1.0, 0.001),), seeds=(42, 44), batch=7)
    todo = of_file(todo, weights) if pretrained else todo
    built, init = [], lockstep.Workload.__init__
    monkeypatch.setattr(lockstep.Workload, "__init__", lambda *args: built.append(1) or init(*args))
    outcomes, tensors = side_by_side(todo, tmp_path, monkeypatch)
    # A seed that draws its own backbone has features of its own.
    assert len(built) == (1 if pretrained else 2)
    for job, outcome, ended in zip(todo, outcomes, tensors, strict=True):
        single, expected = alone(job, tmp_path / "alone")
        for name, tensor in expected.items():
            assert torch.equal(ended[name], tensor), f"{job}: {name}"
        assert outcome["test_accuracy"]["last"] == single["test_accuracy"]["last"]
        assert outcome["history"] == single["history"]
    assert not torch.equal(tensors[0]["head.weight"], tensors[1]["head.weight"])


def test_a_run_that_diverges_is_lost_alone(vtab, tmp_path):
    # With such a rate the weights overflow within two steps.
    todo = jobs(vtab, points=((1e37, 0.01), (1.0, 0.0)))
    outcomes = train(todo, tmp_path)
    assert outcomes[0] is None and todo[0].run(tmp_path)["accuracy"] == "0"
    assert todo[0].row_of(None, tmp_path) == todo[0].run(tmp_path)
    single, _ = alone(todo[1], tmp_path / "alone")
    assert outcomes[1]["history"][-1]["val_accuracy"] == single["history"][-1]["val_accuracy"]


def test_a_study_trains_its_grid_at_once(vtab, tmp_path, monkeypatch):
    counted, together_ = [], lockstep.train
    monkeypatch.setattr(lockstep, "train", lambda c, *rest: counted.append(len(c)) or together_(c, *rest))
    todo, results, said = jobs(vtab), Results(tmp_path / "results.csv"), []
    features = FeatureStore(tmp_path / "features", warn=said.append)
    store, advanced = study.storage(None, tmp_path), []
    results.add(todo[0].run(tmp_path / "runs"))
    study.run_all(todo, results, tmp_path / "runs", store, advanced.append, features)
    assert counted == [2] and advanced == todo and said == []
    rows = results.rows()
    assert [row["point"] for row in rows] == [str(job.key()["point"]) for job in todo]
    assert all(row["trained_parameters"] == rows[0]["trained_parameters"] for row in rows)
    # Each grid point is a trial with its own accuracy.
    import optuna

    (name,) = optuna.get_all_study_names(storage=store)
    trials = optuna.load_study(study_name=name, storage=store).trials
    assert [trial.value for trial in trials] == [float(row["accuracy"]) for row in rows[1:]]
    # Images of the search are kept but for the one test image.
    assert len(list((tmp_path / "features").glob("*.safetensors"))) == 2
    # What differs in more than rates and seed goes alone, and so do methods that train from the first block on.
    assert together._shape(todo[0].config(tmp_path)) == together._shape(todo[2].config(tmp_path))
    assert together._shape(todo[0].config(tmp_path)) != together._shape(jobs(vtab, batch=5)[0].config(tmp_path))
    assert together._shape(jobs(vtab, "bias")[0].config(tmp_path)) is None


def test_runs_whose_features_are_too_large_go_alone(vtab, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_features, "LIMIT_BYTES", 10)
    todo, results = jobs(vtab)[:2], Results(tmp_path / "results.csv")
    trained, run = [], Job.run
    monkeypatch.setattr(Job, "run", lambda self, *rest: trained.append(self) or run(self, *rest))
    study.run_all(todo, results, tmp_path / "runs", study.storage(None, tmp_path), lambda job: None)
    assert trained == todo and len(results.rows()) == 2
    assert not [path for path in (tmp_path / "runs").iterdir() if path.is_dir()]


def test_few_runs_at_a_time_where_memory_is_short(vtab, tmp_path, monkeypatch):
    todo = jobs(vtab)
    whole = train(todo, tmp_path)
    monkeypatch.setattr(lockstep, "LIMIT_BYTES", 1)
    assert [one["history"] for one in train(todo, tmp_path)] == [one["history"] for one in whole]


class Killed(Exception):
    pass


@pytest.mark.parametrize("row", ["mlp-3", "partial-1"])
def test_an_interrupted_group_goes_on_where_it_was(vtab, tmp_path, monkeypatch, row):
    # The first run is lost in the first epoch.
    todo = jobs(vtab, row, batch=5, points=((1e30, 0.01), (1.0, 0.0), (0.05, 0.0001)), epochs=5)
    (tmp_path / "whole").mkdir()
    with monkeypatch.context() as patch:
        whole, expected = [], {}
        evaluate = lockstep._evaluate
        patch.setattr(
            lockstep,
            "_evaluate",
            lambda work, these, *rest: expected.update({r.index: r for r in these}) or evaluate(work, these, *rest),
        )
        whole = train(todo, tmp_path / "whole")
    assert whole[0] is None and expected.keys() == {1, 2}
    monkeypatch.setattr(lockstep, "SAVE_AFTER", 0.0)
    step, taken = lockstep._step, []

    def kill(work, runs, orders, epoch, *rest):
        taken.append(epoch)
        if epoch == 3 and len(taken) > 9:
            raise Killed
        return step(work, runs, orders, epoch, *rest)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(lockstep, "_step", kill)
        train(todo, tmp_path)
    taken.clear()
    found = {}
    monkeypatch.setattr(lockstep, "_step", lambda *rest: taken.append(rest[3]) or step(*rest))
    evaluate = lockstep._evaluate
    monkeypatch.setattr(
        lockstep,
        "_evaluate",
        lambda work, these, *rest: found.update({r.index: r for r in these}) or evaluate(work, these, *rest),
    )
    again = train(todo, tmp_path)
    assert taken[0] == 3 and [one and one["history"] for one in again] == [one and one["history"] for one in whole]
    for index, run in expected.items():
        for name, tensor in run.tensors.items():
            assert torch.equal(found[index].tensors[name], tensor), name
    # Other runs do not take them for their own.
    taken.clear()
    train(todo[1:], tmp_path)
    assert taken[0] == 0


def test_of_several_parts_a_later_one_goes_on_too(vtab, tmp_path, monkeypatch):
    todo, step, taken = jobs(vtab, epochs=4)[:2], lockstep._step, []
    monkeypatch.setattr(lockstep, "SAVE_AFTER", 0.0)
    monkeypatch.setattr(lockstep, "LIMIT_BYTES", 1)

    def kill(work, runs, orders, epoch, *rest):
        taken.append(epoch)
        if len(taken) == 7:
            raise Killed
        return step(work, runs, orders, epoch, *rest)

    monkeypatch.setattr(lockstep, "_step", kill)
    with pytest.raises(Killed):
        train(todo, tmp_path)
    # By then the first has its row.
    train(todo[1:], tmp_path)
    assert taken == [0, 1, 2, 3, 0, 1, 2, 2, 3]
