"""Runs that share features: what they are named by, which splits are kept, and that nothing is lost by reading them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastpeft.config import load_config
from fastpeft.trainer import feature_key, features, launch, precision, session
from fastpeft.trainer.feature_store import FeatureStore
from fastpeft.trainer.report import Reporter
from fastpeft.trainer.task import prepare


@pytest.fixture
def configured(write_config, tmp_path):
    """A configuration with its own copy of the images."""

    def make(method=None, **changes):
        root = tmp_path / "images"
        if not root.exists():
            shutil.copytree(load_config(write_config()).data.root, root)
        train = {"lr": {}, "base_lr": 0.1, "optimizer": "sgd"} | changes.pop("train", {})
        data = {"root": str(root)} | changes.pop("data", {})
        return load_config(write_config(method=method or {"name": "linear"}, train=train, data=data, **changes))

    return make


def run(config, store=None):
    return session.run(config, "test", True, Reporter(False), launch.find_ranks(), store)


def adapter(config):
    from safetensors.torch import load_file

    return load_file(Path(config.out) / "adapter" / "adapter_model.safetensors")


def key(config, split="train", dtype=torch.float32):
    task, model = prepare(config, "test")
    precision.cast_frozen(model, dtype)
    import fastpeft

    prefix = fastpeft.frozen_prefix(model)
    return feature_key.feature_key(prefix, config, getattr(task.splits, split), launch.find_ranks(), dtype)


@pytest.mark.parametrize("method", [{"name": "linear"}, {"name": "mlp_head", "k": 2}, {"name": "partial", "k": 1}])
def test_kept_features_train_the_same_model(configured, tmp_path, monkeypatch, method):
    store, encoded = FeatureStore(tmp_path / "features"), []
    encode = features._encode
    monkeypatch.setattr(features, "_encode", lambda *rest: encoded.append(rest[-1]) or encode(*rest))
    found = []
    for number, kept in enumerate((None, store, store)):
        config = configured(method, out=str(tmp_path / str(number)))
        outcome = run(config, kept)
        found.append((outcome["test_accuracy"], outcome["history"], adapter(config)))
    assert encoded == ["train", "val", "test"] * 2
    for accuracy, history, tensors in found[1:]:
        assert accuracy == found[0][0] and history == found[0][1]
        for name, tensor in found[0][2].items():
            assert torch.equal(tensors[name], tensor), name


def test_methods_with_the_same_prefix_share(configured, tmp_path):
    linear, mlp, partial = (key(configured({"name": n, **more})) for n, more in (
        ("linear", {}), ("mlp_head", {"k": 3}), ("partial", {"k": 1})))  # fmt: skip
    assert linear == mlp != partial


@pytest.mark.parametrize(
    "change",
    ["seed of random weights", "pixels", "touched", "order", "size", "resize", "mean", "precision", "split", "code",
     "environment", "label"],
)  # fmt: skip
def test_what_features_depend_on(configured, tmp_path, monkeypatch, change):
    config = configured()
    before = key(config)
    image = next(path for path in sorted((tmp_path / "images" / "train").rglob("*.png")))
    same, split, dtype = False, "train", torch.float32
    if change == "seed of random weights":
        config = configured(train={"seed": 1})
    elif change == "pixels":
        pixels = Image.open(image).copy()
        pixels.putpixel((0, 0), (1, 2, 3))
        pixels.save(image)
    elif change == "touched":
        image.touch()
        same = True
    elif change == "order":
        image.rename(image.with_name("zzz.png"))
    elif change == "size":
        config = configured(model={"image_size": 64})
    elif change == "resize":
        config = configured(data={"resize": "crop"})
    elif change == "mean":
        config = configured(model={"mean": [0.1, 0.2, 0.3]})
    elif change == "precision":
        dtype = torch.bfloat16
    elif change == "split":
        split = "val"
    elif change == "code":
        monkeypatch.setattr(feature_key, "code_digest", lambda: "another")
    elif change == "environment":
        monkeypatch.setenv("FASTPEFT_BACKEND", "reference")
    elif change == "label":
        # Labels are no part of features: they are the lists', whatever is kept.
        folders = tmp_path / "images" / "train"
        for old, new in (("blue", "a"), ("green", "b"), ("red", "c")):
            (folders / old).rename(folders / new)
        same = True
        monkeypatch.setattr(feature_key, "images_digest", feature_key.images_digest)
        (tmp_path / "images" / "val").rename(tmp_path / "val")
        shutil.copytree(folders, tmp_path / "images" / "val")
        shutil.rmtree(tmp_path / "images" / "test")
        shutil.copytree(folders, tmp_path / "images" / "test")
    after = key(config, split, dtype)
    assert (after == before) == same, json.dumps(after)


def test_splits_that_no_other_run_reads_are_not_kept(configured, tmp_path):
    run(configured(), FeatureStore(tmp_path / "features").of("train", "val"))
    sizes = {15 * 3, 4 * 3}
    kept = [json.loads(_about(path)["key"])["images"] for path in (tmp_path / "features").glob("*.safetensors")]
    assert sorted(kept) == sorted(sizes)
    run(configured(out=str(tmp_path / "again")), FeatureStore(tmp_path / "none", limit=0))
    assert not (tmp_path / "none").exists()


def _about(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("method", [{"name": "linear"}, {"name": "partial", "k": 1}])
def test_a_test_split_that_is_too_large_is_encoded_as_it_is_evaluated(configured, tmp_path, monkeypatch, method):
    whole = configured(method, out=str(tmp_path / "whole"))
    expected = run(whole)
    per_image = {"linear": 64, "partial": 64 * 5}[method["name"]] * 4
    encode, encoded = features._encode, []
    monkeypatch.setattr(features, "_encode", lambda *rest: encoded.append(rest[-1]) or encode(*rest))
    monkeypatch.setattr(features, "LIMIT_BYTES", per_image * (45 + 12))
    config = configured(method, out=str(tmp_path / "part"))
    found = run(config)
    assert encoded == ["train", "val"]
    assert found["test_accuracy"] == expected["test_accuracy"] and found["history"] == expected["history"]
    for name, tensor in adapter(whole).items():
        assert torch.equal(adapter(config)[name], tensor)
    monkeypatch.setattr(features, "LIMIT_BYTES", 10)
    assert run(configured(method, out=str(tmp_path / "none")))["cached_features"] is None


def test_a_broken_image_is_named_before_anything_is_trained(configured, tmp_path):
    from fastpeft.errors import FastPEFTError

    config = configured()
    image = next((tmp_path / "images" / "test").rglob("*.png"))
    image.write_bytes(image.read_bytes()[:60])
    with pytest.raises(FastPEFTError, match=image.name):
        run(config, FeatureStore(tmp_path / "features"))
    assert not (Path(config.out) / "results.json").exists()
