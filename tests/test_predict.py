"""Class names and probabilities from a saved adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import fastpeft
from fastpeft import predict
from fastpeft.models.build import build_model
from fastpeft.train import main as train
from tests.trainer.conftest import images, write_run  # noqa: F401 - fixtures

SIZE, MEAN, STD = 32, [0.5] * 3, [0.5] * 3


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("trained")
    assert train(["--config", str(write_run(images, folder, train={"epochs": 12}))]) == 0
    return folder / "out" / "adapter"


@pytest.fixture
def adapter(trained, tmp_path) -> Path:
    """A copy, which a test may spoil."""
    return Path(shutil.copytree(trained, tmp_path / "adapter"))


def test_the_command_names_classes(adapter, images, capfd):  # noqa: F811
    paths = [str(images / "test" / name / "001.png") for name in ("blue", "green", "red")]
    assert predict.main([str(adapter), *paths, "--top", "2"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 3
    for path, name, line in zip(paths, ("blue", "green", "red"), lines, strict=True):
        assert line.startswith(f"{path}: {name} ") and line.count("%") == 2


def test_probabilities_are_the_models(adapter, images):  # noqa: F811
    path = images / "test" / "red" / "000.png"
    predictor = predict.Predictor(adapter)
    probabilities = predictor(path)
    assert probabilities.shape == (3,) and float(probabilities.sum()) == pytest.approx(1)
    config = fastpeft.read_config(adapter)
    torch.manual_seed(config["init_seed"])
    model = fastpeft.load(build_model("test_vit", 3, SIZE, weights="random"), adapter).eval()
    from fastpeft.data import load_image

    image = load_image(path, SIZE, config["mean"], config["std"])
    torch.testing.assert_close(probabilities, model(image[None]).softmax(dim=1)[0].detach())


def test_a_corrupt_image_is_one_line_and_the_others_are_classified(adapter, images, tmp_path, capfd):  # noqa: F811
    broken, good = tmp_path / "broken.png", str(images / "test" / "blue" / "000.png")
    broken.write_bytes(b"\x89PNG\r\n\x1a\n, but no more")
    assert predict.main([str(adapter), str(broken), good]) == 2
    out, err = capfd.readouterr()
    assert len(err.strip().splitlines()) == 1 and str(broken) in err
    assert out.startswith(f"{good}: blue")


def test_a_folder_that_is_no_adapter(tmp_path, capfd):
    assert predict.main([str(tmp_path), "image.png"]) == 2
    err = capfd.readouterr().err
    assert len(err.strip().splitlines()) == 1 and str(tmp_path) in err


def test_an_adapter_without_metadata_says_what_is_missing(tmp_path, capfd):
    model = build_model("test_vit", 3, SIZE)
    fastpeft.save(fastpeft.patch(model, fastpeft.Linear()), tmp_path / "bare", mean=MEAN, std=STD)
    assert predict.main([str(tmp_path / "bare"), "image.png"]) == 2
    assert "base_model, image_size, class_names" in capfd.readouterr().err


def test_more_classes_than_asked_for_are_no_error(adapter, images, capfd):  # noqa: F811
    assert predict.main([str(adapter), str(images / "test" / "red" / "000.png"), "--top", "50"]) == 0
    assert capfd.readouterr().out.count("%") == 3


def test_top_must_be_positive(capfd):
    with pytest.raises(SystemExit) as caught:
        predict.main(["folder", "image.png", "--top", "0"])
    assert caught.value.code == 2
    assert "--top" in capfd.readouterr().err


@pytest.mark.parametrize("key, value", [("image_size", "32"), ("mean", 3), ("class_names", "blue"), ("base_model", 1)])
def test_a_value_of_the_wrong_kind_is_named(adapter, images, capfd, key, value):  # noqa: F811
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert predict.main([str(adapter), str(images / "test" / "red" / "000.png")]) == 2
    err = capfd.readouterr().err
    assert len(err.strip().splitlines()) == 1 and f"{key} is {value!r}" in err
