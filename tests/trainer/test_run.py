"""Whole runs in this process: every method, format and option that changes the loop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastpeft


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def test_a_run_learns_and_leaves_everything_it_promises(train, write_config, tmp_path):
    code, out, err = train(write_config(train={"epochs": 12}), draws=True)
    assert code == 0, err
    found = results(tmp_path / "out")
    assert found["test_accuracy"]["last"] > 0.9
    assert len(found["history"]) == 12
    assert found["history"][-1]["train_loss"] < found["history"][0]["train_loss"]
    assert found["trained_parameters"] == sum(t.numel() for t in adapter(tmp_path / "out").values())
    assert found["versions"]["torch"] == torch.__version__
    for name in ("curves.png", "adapter/adapter_config.json", "tensorboard", "checkpoints", "config.json"):
        assert (tmp_path / "out" / name).exists()
    saved = fastpeft.read_config(tmp_path / "out" / "adapter")
    assert saved["class_names"] == ["blue", "green", "red"]
    assert saved["base_model"] == "test_vit"
    assert "epoch 12/12" in out and "python -m fastpeft.predict" in out


def test_a_finished_run_started_again_only_shows_its_results(train, write_config, tmp_path):
    config = write_config(train={"epochs": 2, "warmup_epochs": 0})
    train(config)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file() and p.name != ".lock"}
    code, out, _ = train(config)
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file() and p.name != ".lock"}
    assert code == 0 and "is finished" in out and "test accuracy" in out
    assert before == after


def test_a_changed_configuration_in_the_same_folder_names_the_keys(train, write_config):
    config = write_config(train={"epochs": 2, "warmup_epochs": 0})
    train(config)
    code, _, err = train(config, "train.seed=1", "method.length=4")
    assert code == 2
    assert "method.length (was 3, now 4), train.seed (was 0, now 1)" in err
    assert len(err.strip().splitlines()) == 1
    code, out, _ = train(config, "train.seed=1", "method.length=4", "--fresh")
    assert code == 0 and "is finished" not in out


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_with_fp32_masters(train, write_config, tmp_path, precision):
    code, _, err = train(write_config(train={"epochs": 12, "precision": precision}))
    assert code == 0, err
    assert results(tmp_path / "out")["test_accuracy"]["last"] > 0.9
    assert {tensor.dtype for tensor in adapter(tmp_path / "out").values()} == {torch.float32}


@pytest.mark.parametrize(
    "method",
    [
        {"name": "full"},
        {"name": "linear"},
        {"name": "partial", "k": 1},
        {"name": "mlp_head", "k": 2},
        {"name": "bitfit"},
        {"name": "lora", "rank": 2, "dropout": 0.1},
        {"name": "prefix", "length": 2},
        {"name": "adapter", "reduction": 8},
        {"name": "serial_adapter", "hidden": 4},
        {"name": "parallel_adapter", "hidden": 4},
        [{"name": "vpt", "length": 2}, {"name": "bitfit"}],
        [{"name": "vpt", "length": 2}, {"name": "full"}],
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_every_method_trains(train, write_config, tmp_path, method, precision):
    rates = {"lr": {}, "base_lr": 0.03, "optimizer": "sgd", "epochs": 2, "precision": precision}
    code, _, err = train(write_config(method=method, train=rates))
    assert code == 0, err
    history = results(tmp_path / "out")["history"]
    assert history[-1]["train_loss"] < history[0]["train_loss"]


def test_gradient_accumulation_gives_the_same_step(train, write_config, tmp_path):
    method = {"name": "vpt", "length": 3, "dropout": 0.0}
    for parts in (1, 2, 4):
        config = write_config(method=method, train={"grad_accumulation": parts}, out=str(tmp_path / f"parts{parts}"))
        assert train(config)[0] == 0
    whole = adapter(tmp_path / "parts1")
    for parts in (2, 4):
        for name, tensor in adapter(tmp_path / f"parts{parts}").items():
            torch.testing.assert_close(tensor, whole[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_zero_stages_give_the_same_adapter_on_one_rank(train, write_config, tmp_path, zero):
    for stage in (0, zero):
        assert train(write_config(train={"zero": stage}, out=str(tmp_path / f"zero{stage}")))[0] == 0
    plain = adapter(tmp_path / "zero0")
    for name, tensor in adapter(tmp_path / f"zero{zero}").items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", [{"name": "linear"}, {"name": "mlp_head", "k": 2}, {"name": "partial", "k": 1}])
def test_cached_features_train_the_same_model(train, write_config, tmp_path, method):
    for cache in ("auto", "off"):
        rates = {"lr": {}, "base_lr": 0.1, "optimizer": "sgd", "cache_features": cache}
        assert train(write_config(method=method, train=rates, out=str(tmp_path / cache)))[0] == 0
    assert results(tmp_path / "auto")["cached_features"] and not results(tmp_path / "off")["cached_features"]
    plain = adapter(tmp_path / "off")
    for name, tensor in adapter(tmp_path / "auto").items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-3, atol=1e-5)


def test_random_transforms_are_not_cached(train, write_config, tmp_path):
    config = write_config(method={"name": "linear"}, data={"augment": "flip"}, train={"lr": {"head": 0.01}})
    assert train(config)[0] == 0
    assert results(tmp_path / "out")["cached_features"] is None


def test_the_best_epoch_on_validation_is_kept(train, write_config, tmp_path, monkeypatch):
    from fastpeft.trainer.loop import Loop

    accuracies = {"val": iter([0.2, 0.9, 0.5]), "test": iter([0.3, 0.7])}
    monkeypatch.setattr(
        Loop, "measure", lambda self, split: {f"{split}_accuracy": next(accuracies[split]), f"{split}_loss": 1.0}
    )
    code, out, err = train(write_config(train={"checkpoint_every": "1 step"}))
    assert code == 0, err
    found = results(tmp_path / "out")
    assert found["selected_epoch"] == 2
    assert found["test_accuracy"] == {"last": 0.3, "best_val": 0.7}
    assert fastpeft.read_config(tmp_path / "out" / "adapter")["epoch"] == 2
    assert "best on validation" in out


def test_loader_processes_change_nothing(train, write_config, tmp_path):
    for workers in (0, 2):
        data = {"workers": workers, "augment": "flip"}
        assert train(write_config(data=data, out=str(tmp_path / f"workers{workers}")))[0] == 0
    plain = adapter(tmp_path / "workers0")
    for name, tensor in adapter(tmp_path / "workers2").items():
        assert torch.equal(tensor, plain[name])


def test_another_seed_gives_another_adapter(train, write_config, tmp_path):
    for seed in (0, 1):
        assert train(write_config(train={"seed": seed}, out=str(tmp_path / f"seed{seed}")))[0] == 0
    first, second = adapter(tmp_path / "seed0"), adapter(tmp_path / "seed1")
    assert any(not torch.equal(first[name], second[name]) for name in first)
