"""Learning rates, weight decay, schedules, and how heads start."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastpeft.config import ConfigError, TrainConfig
from fastpeft.config_mplug import MPlugTrainConfig
from fastpeft.trainer import heads, optim

HEAD = [("head.weight", nn.Parameter(torch.zeros(5, 8))), ("head.bias", nn.Parameter(torch.zeros(5)))]
NORMS = [("norm.weight", nn.Parameter(torch.ones(8))), ("norm.bias", nn.Parameter(torch.zeros(8)))]
GROUPS = {"head": HEAD, "backbone": NORMS}


def rates(**options) -> dict[str, float]:
    return optim.base_rates(GROUPS, TrainConfig(epochs=20, **options))


def test_base_lr_is_scaled_and_a_groups_own_rate_is_not():
    assert rates(batch_size=64, base_lr=1.0) == {"head": 0.25, "backbone": 0.25}
    assert rates(batch_size=64, base_lr=1.0, scale_lr=False) == {"head": 1.0, "backbone": 1.0}
    assert rates(batch_size=64, base_lr=1.0, lr={"head": 0.5}) == {"head": 0.5, "backbone": 0.25}


def test_groups_that_do_not_match_are_named():
    with pytest.raises(ConfigError, match=r"train\.lr\.heads: no such parameter group; did you mean 'head'\?"):
        rates(lr={"heads": 1.0})
    with pytest.raises(ConfigError, match="no rate for group 'backbone'"):
        rates(lr={"head": 1.0})


@pytest.mark.parametrize(("optimizer", "spared"), [("sgd", {"head.bias"}), ("adamw", {"head.bias", "norm.bias"})])
def test_weight_decay_spares_biases_as_the_protocols_say(optimizer, spared):
    config = TrainConfig(epochs=20, base_lr=1.0, optimizer=optimizer, weight_decay=0.1)
    built = optim.build_optimizer(GROUPS, 5, config)
    names = {id(parameter): name for members in GROUPS.values() for name, parameter in members}
    found = {names[id(p)] for group in built.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    assert found == spared
    assert sum(len(group["params"]) for group in built.param_groups) == 4


def test_sgd_spares_the_bias_of_the_words_that_mplug_predicts():
    output = [("text_decoder.cls.predictions.bias", nn.Parameter(torch.zeros(30)))]
    hidden = [("text_decoder.cls.predictions.transform.dense.bias", nn.Parameter(torch.zeros(8)))]
    config = MPlugTrainConfig(steps=20, base_lr=1.0, optimizer="sgd", weight_decay=0.1)
    built = optim.build_optimizer({"classifier": output + hidden}, 0, config)
    decays = {id(parameter): group["weight_decay"] for group in built.param_groups for parameter in group["params"]}
    assert decays == {id(output[0][1]): 0.0, id(hidden[0][1]): 0.1}


def test_the_rate_rises_once_an_epoch_and_falls_along_a_cosine():
    config = TrainConfig(epochs=100, base_lr=1.0)
    factors = [optim.rate_factor(config, epoch, step, 7) for epoch in range(100) for step in range(7)]
    assert len(set(factors[:7])) == 1
    by_epoch = factors[::7]
    assert by_epoch[:10] == pytest.approx([(epoch + 1) / 10 for epoch in range(10)])
    assert by_epoch[10] == 1.0
    assert by_epoch[55] == pytest.approx(0.5 * (1 + math.cos(math.pi * 45 / 90)))
    assert 0 < by_epoch[99] < 0.001


def test_the_rate_can_change_every_step_and_stay_constant_after_the_warm_up():
    config = TrainConfig(epochs=4, base_lr=1.0, warmup_epochs=1, schedule_by="step")
    assert [optim.rate_factor(config, 0, step, 4) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    later = [optim.rate_factor(config, epoch, step, 4) for epoch in range(1, 4) for step in range(4)]
    assert later[0] == 1.0 and sorted(later, reverse=True) == later and len(set(later)) == len(later)
    constant = TrainConfig(epochs=4, base_lr=1.0, warmup_epochs=1, schedule="constant")
    assert [optim.rate_factor(constant, epoch, 0, 4) for epoch in range(1, 4)] == [1.0, 1.0, 1.0]


def test_the_head_starts_as_in_the_vpt_code():
    hidden = ("head.mlp.0.weight", nn.Parameter(torch.zeros(400, 300)))
    norm = ("head.mlp.2.weight", nn.Parameter(torch.ones(400)))
    output = [("head.weight", nn.Parameter(torch.zeros(5, 400))), ("head.bias", nn.Parameter(torch.zeros(5)))]
    heads.initialise([hidden, norm, *output], 5, seed=3)
    assert float(hidden[1].detach().std()) == pytest.approx(math.sqrt(2 / 400), rel=0.02)
    assert float(output[0][1].detach().std()) == pytest.approx(math.sqrt(2 / 5), rel=0.1)
    assert torch.all(norm[1] == 1)
    assert torch.allclose(output[1][1], torch.tensor(-4.595), atol=1e-3)
