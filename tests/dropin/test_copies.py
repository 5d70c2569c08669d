"""Copies, pickles, wrappers, and the way back."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from timm.models.vision_transformer import ResPostBlock
from torch import nn

import fastpeft
from tests.dropin.both import assert_same_state, assert_same_steps, pair
from tests.tiny import DIM, VARIANTS, images, vit


def pickled(model: nn.Module) -> nn.Module:
    """Through pickle."""
    return pickle.loads(pickle.dumps(model))


def stored(model: nn.Module) -> nn.Module:
    """Through a file of torch.save."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, stored])
@pytest.mark.parametrize("variant", ["class_token", "distilled", "gated_mlp"])
def test_copies_are_patched_and_independent(variant, copied):
    plain, patched = pair(vit(variant, dtype=torch.float64, drop_path_rate=0.3))
    other = copied(patched)
    x = images(variant, dtype=torch.float64)
    assert len(fastpeft.summary(other).fused) == 3
    assert_same_state(plain, other)
    assert_same_steps(plain, other, x)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert_same_steps(plain, patched, x)
    fastpeft.unpatch(other)
    assert len(fastpeft.summary(patched).fused) == 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_unpatch_gives_the_model_back(variant):
    plain, patched = pair(vit(variant, dtype=torch.float64, drop_path_rate=0.3))
    assert fastpeft.unpatch(patched) is patched
    assert [type(m) for m in plain.modules()] == [type(m) for m in patched.modules()]
    for mine, other in zip(plain.modules(), patched.modules(), strict=True):
        assert mine.__dict__.keys() == other.__dict__.keys()
    assert_same_state(plain, patched)
    assert_same_steps(plain, patched, images(variant, dtype=torch.float64))
    assert_same_steps(plain, fastpeft.patch(patched), images(variant, dtype=torch.float64))


def test_unpatch_keeps_what_was_done_in_between():
    model = fastpeft.patch(vit().eval())
    model.blocks[1].requires_grad_(False)
    model.blocks[2].train()
    modes = {name: module.training for name, module in model.named_modules()}
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    fastpeft.unpatch(model)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert trained == {name: p.requires_grad for name, p in model.named_parameters()}


def test_unpatch_after_a_method_gives_back_requires_grad():
    model = vit()
    model.blocks[1].requires_grad_(False)
    plain, patched = pair(model)
    fastpeft.patch(patched, fastpeft.VPT(4))
    assert_same_state(plain, fastpeft.unpatch(patched, discard=True))


class Wrapper(nn.Module):
    """A model that holds a transformer."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x):
        return self.scale * self.inner(x)


@pytest.mark.parametrize("wrap", [Wrapper, nn.Sequential, lambda m: nn.ModuleDict({"a": m, "b": vit(seed=3)})])
def test_models_that_hold_transformers(wrap):
    plain, patched = pair(wrap(vit(dtype=torch.float64)).double())
    count = sum(isinstance(module, type(vit())) for module in plain.modules())
    assert len(fastpeft.summary(patched).fused) == 3 * count
    x = images(dtype=torch.float64)
    if isinstance(plain, nn.ModuleDict):
        assert_same_steps(plain, patched, x, lambda model, x: [inner(x) for inner in model.values()])
    else:
        assert_same_steps(plain, patched, x)
    assert_same_state(plain, fastpeft.unpatch(patched))


def test_wrapping_and_unwrapping_a_patched_model():
    inner = fastpeft.patch(vit(dtype=torch.float64))
    outer = Wrapper(inner)
    assert fastpeft.patch(outer) is outer
    assert len(fastpeft.summary(outer).fused) == 3
    fastpeft.unpatch(inner)
    assert fastpeft.summary(outer).fused == []
    fastpeft.patch(outer)
    assert len(fastpeft.summary(inner).fused) == 3
    assert fastpeft.patch(inner) is inner
    fastpeft.unpatch(outer)
    assert type(inner) is type(vit())


def test_one_method_whichever_module_it_was_given_to():
    inner = vit()
    outer = Wrapper(inner)
    fastpeft.patch(outer)
    fastpeft.patch(inner, fastpeft.LoRA(2))
    with pytest.raises(fastpeft.MethodError, match="already carries LoRA"):
        fastpeft.patch(outer, fastpeft.VPT(2))
    fastpeft.unpatch(outer, discard=True)
    fastpeft.patch(outer, fastpeft.LoRA(2))
    with pytest.raises(fastpeft.FastPEFTError, match="the method of a model around it"):
        fastpeft.patch(inner, fastpeft.VPT(2))


def test_what_is_left_alone_is_listed_by_its_path_in_the_model_at_hand():
    inner = vit()
    inner.blocks[1] = ResPostBlock(DIM, 2)
    fastpeft.patch(inner, strict=False)
    assert [path for path, _ in fastpeft.summary(inner).left_alone] == ["blocks.1"]
    assert [path for path, _ in fastpeft.summary(Wrapper(inner)).left_alone] == ["inner.blocks.1"]
