"""What the head reads, and how positions are brought to a size: from the configuration to training and prediction."""

from __future__ import annotations

import pytest
import torch

import fastpeft
from fastpeft import predict
from fastpeft.config import Config
from fastpeft.trainer import task as tasks


def config(images, **model) -> Config:
    return Config.model_validate(
        {
            "model": {"name": "test_vit", "weights": "random", "image_size": 32, **model},
            "data": {"name": "folder", "root": str(images)},
            "method": {"name": "vpt", "length": 3},
            "train": {"epochs": 2, "warmup_epochs": 1, "base_lr": 0.1},
            "out": "unused",
        }
    )


def test_only_what_is_set_is_passed_on(images):
    assert config(images).model.options == {}
    assert config(images, pos_resize="vpt").model.options == {"pos_resize": "vpt"}
    pooled = config(images, global_pool="avg", fc_norm=False)
    assert pooled.model.options == {"global_pool": "avg", "fc_norm": False}


@pytest.mark.parametrize("fc_norm, norm", [(False, "norm"), (True, "fc_norm")])
def test_mean_of_the_patches_with_the_norm_before_or_behind(images, fc_norm, norm):
    _, model = tasks.prepare(config(images, global_pool="avg", fc_norm=fc_norm), "test")
    assert model.global_pool == "avg" and isinstance(getattr(model, norm), torch.nn.LayerNorm)
    other = {"norm": "fc_norm", "fc_norm": "norm"}[norm]
    assert isinstance(getattr(model, other), torch.nn.Identity)
    x = torch.randn(2, 3, 32, 32)
    rows = model.eval().forward_features(x)
    expected = model.head(model.fc_norm(rows[:, 1:].mean(1)))
    torch.testing.assert_close(model(x), expected)


def test_a_pooled_model_is_predicted_with_as_it_was_trained(train, write_config, images, tmp_path):
    code, _, err = train(write_config(model={"global_pool": "avg", "fc_norm": False}))
    assert code == 0, err
    folder = tmp_path / "out" / "adapter"
    assert fastpeft.read_config(folder)["model_options"] == {"global_pool": "avg", "fc_norm": False}
    assert predict.Predictor(folder).model.global_pool == "avg"


def test_a_pool_that_is_not_known(images, train, write_config):
    code, _, err = train(write_config(), "model.global_pool=prompts")
    assert code == 2 and "model.global_pool" in err
