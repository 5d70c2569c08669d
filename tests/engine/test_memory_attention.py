"""Attention to a memory without its keys and values, on CPUs of any instruction set."""

from __future__ import annotations

import copy

import pytest
import torch

import fastpeft
from fastpeft._native import LEVELS
from fastpeft.engine import packed
from fastpeft.ops.choose import Chip, emulated
from tests.engine.test_mplug_backends import BOUND, assert_same, gradients, losses
from tests.methods.mplug_models import METHODS
from tests.models.mplug.tiny import batch, make
from tests.tiny import randomise


@pytest.fixture
def attended(monkeypatch):
    """Queries of a sample, of every call."""
    found = []
    whole = packed.memory_attention
    monkeypatch.setattr(packed, "memory_attention", lambda q, *rest: found.append(q.shape[2]) or whole(q, *rest))
    return found


@pytest.mark.parametrize("level", ["none", "avx2", "amx"])
@pytest.mark.parametrize("name", ["prefix", "lora", "parallel"])
def test_short_answers_are_asked_for_on_the_queries_side(name, level, attended):
    """In fp32, where no instruction set has packed layers: the same losses and gradients as by keys and values."""
    model = randomise(fastpeft.patch(make(), METHODS[name]), scale=0.3)
    twin = fastpeft.patch(copy.deepcopy(model), backend="reference")
    with torch.no_grad():
        image = twin.encode_image(batch().images)
    expected = losses(twin, image)["vqa"]
    assert not attended
    with emulated(Chip("cpu", list(LEVELS).index(level))):
        found = losses(model, image)["vqa"]
    assert attended, "the decoder reads its memory so"
    torch.testing.assert_close(found, expected, rtol=BOUND, atol=BOUND)
    assert_same(gradients(model, found), gradients(twin, expected))


def test_who_asks_for_the_reference_gets_keys_and_values(attended):
    model = randomise(fastpeft.patch(make(), METHODS["lora"], backend="reference"))
    with torch.no_grad():
        losses(model, model.encode_image(batch().images))
    assert not attended


def test_trained_keys_have_a_gradient(attended):
    """Whoever trains the layers trains them all, the keys' bias too."""
    model = fastpeft.patch(make())
    with torch.no_grad():
        image = model.encode_image(batch().images)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".crossattention." in name or "cross" in name)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    losses(model, image)["vqa"].backward()
    assert not attended and all(p.grad is not None for p in trained)
