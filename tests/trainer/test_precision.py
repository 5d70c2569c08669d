"""Number formats and the loss scale."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastpeft.trainer import precision


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx2", "amx_bf16"}, (torch.bfloat16, "amx_bf16")),
        ({"avx512_bf16"}, (torch.bfloat16, "avx512_bf16")),
        ({"avx2"}, (torch.float32, "neither")),
        (set(), (torch.float32, "neither")),
    ],
)
def test_auto_asks_the_processor(monkeypatch, flags, expected):
    monkeypatch.setattr(precision, "_cpu_flags", lambda: flags)
    dtype, reason = precision.choose("auto", torch.device("cpu"))
    assert dtype == expected[0] and expected[1] in reason


def test_a_configured_format_is_taken():
    assert precision.choose("fp16", torch.device("cpu"))[0] == torch.float16


def test_trained_parameters_stay_masters():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.LayerNorm(4), nn.BatchNorm1d(4))
    model.requires_grad_(False)
    model[0].bias.requires_grad_(True)
    model[1].bias.requires_grad_(True)
    precision.cast_frozen(model, torch.bfloat16)
    half = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.bfloat16}
    # The first normalisation keeps one format because its bias is trained.
    assert half == {"0.weight", "2.weight", "2.bias", "3.weight", "3.bias"}
    assert model[3].running_mean.dtype == torch.float32


def scale(monkeypatch, *gradients: float) -> precision.LossScale:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    parameters = [nn.Parameter(torch.zeros(2)) for _ in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.full((2,), gradient)
    return precision.LossScale(parameters, enabled=True)


def test_gradients_are_unscaled_in_place(monkeypatch):
    found = scale(monkeypatch, 2.0**16, 2.0**17)
    assert found.unscale()
    assert [float(parameter.grad[0]) for parameter in found._parameters] == [1.0, 2.0]


def test_an_overflow_halves_the_scale_and_quiet_doubles_it(monkeypatch):
    found = scale(monkeypatch, 1.0, float("inf"))
    assert not found.unscale()
    found.update(stepped=False)
    assert found.scale == 2.0**15
    for _ in range(found.GROW_AFTER):
        found.update(stepped=True)
    assert found.scale == 2.0**16
    resumed = precision.LossScale([], enabled=True)
    resumed.load(found.state())
    assert resumed.state() == found.state()


def test_other_formats_are_not_scaled():
    found = precision.LossScale([], enabled=False)
    found.update(stepped=False)
    assert found.unscale() and found.scale == 1.0


def test_an_overflow_at_the_smallest_scale_is_the_gradients_own():
    scale = precision.LossScale([], enabled=True)
    while scale.scale > scale.SMALLEST:
        assert not scale.exhausted
        scale.update(stepped=False)
    assert scale.exhausted
    assert not precision.LossScale([], enabled=False).exhausted
