"""`patch(model)` on plain models: any set of frozen parameters, any variant, any entry point."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from timm.layers import set_fused_attn
from torch import nn

import fastpeft
from tests.dropin.both import assert_same, assert_same_steps, pair, step
from tests.tiny import SIZE, VARIANTS, images, vit

DROPOUTS = {
    "projection": {"proj_drop_rate": 0.3},
    "attention": {"attn_drop_rate": 0.3},
    "stochastic_depth": {"drop_path_rate": 0.6},
    "position": {"pos_drop_rate": 0.3},
    "patch": {"patch_drop_rate": 0.5},
    "head": {"drop_rate": 0.3},
    "all": {
        "proj_drop_rate": 0.2,
        "attn_drop_rate": 0.2,
        "drop_path_rate": 0.4,
        "pos_drop_rate": 0.1,
        "patch_drop_rate": 0.3,
        "drop_rate": 0.2,
    },
}


def freeze(model: nn.Module, which: str) -> nn.Module:
    """Freeze a set of parameters: all, all but the head, or a random one by number."""
    generator = random.Random(which)
    share = generator.choice((0.1, 0.5, 0.9))
    for name, parameter in model.named_parameters():
        kept = {"all": False, "backbone": name.startswith("head")}.get(which, generator.random() < share)
        parameter.requires_grad_(kept)
    return model


@pytest.mark.parametrize("frozen", ["all", "backbone", "random 1", "random 2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_frozen_sets(variant, frozen):
    plain, patched = pair(freeze(vit(variant, dtype=torch.float64), frozen))
    assert_same_steps(plain, patched, images(variant, dtype=torch.float64))


@pytest.mark.parametrize("variant", VARIANTS)
def test_single_precision(variant):
    plain, patched = pair(vit(variant))
    assert_same_steps(plain, patched, images(variant), tolerance=1e-5)


@pytest.mark.parametrize("kind", DROPOUTS)
@pytest.mark.parametrize("variant", ["class_token", "average_pool", "registers", "map_pool", "distilled", "gated_mlp"])
def test_random_masks_are_those_of_the_unpatched_model(variant, kind):
    plain, patched = pair(freeze(vit(variant, dtype=torch.float64, **DROPOUTS[kind]), "random 2"))
    assert_same_steps(plain, patched, images(variant, dtype=torch.float64))


def test_masks_when_only_some_modules_train():
    plain, patched = pair(vit(dtype=torch.float64, **DROPOUTS["all"]).eval())
    for model in (plain, patched):
        model.blocks[2].train()
        model.blocks[1].attn.attn_drop.train()
        model.blocks[0].attn.training = True
    x = images(dtype=torch.float64)
    assert_same(step(plain, x), step(patched, x))


def tokens(model) -> int:
    """Rows that enter the blocks at the default size."""
    return model.pos_embed.shape[1] + (model.num_prefix_tokens if model.no_embed_class else 0)


def masks(model, dtype=torch.float64) -> dict[str, dict]:
    """Arguments of a masked forward."""
    count, generator = tokens(model), torch.Generator().manual_seed(3)
    seen = (torch.rand(count, count, generator=generator) < 0.7) | torch.eye(count, dtype=torch.bool)
    added = torch.randn(2, 1, count, count, generator=generator, dtype=dtype)
    return {
        "boolean": {"attn_mask": seen},
        "boolean per head": {"attn_mask": seen.expand(2, 2, count, count)},
        "additive": {"attn_mask": added},
        "causal": {"is_causal": True},
    }


INTERMEDIATES = [
    {},
    {"indices": 1},
    {"indices": [0, 2]},
    {"indices": [1], "stop_early": True},
    {"indices": [0, 1], "norm": True, "output_fmt": "NLC"},
    {"return_prefix_tokens": True},
    {"intermediates_only": True, "norm": True},
    {"output_dict": True},
    {"output_dict": True, "return_prefix_tokens": True, "intermediates_only": True, "indices": 2},
]
ENTRIES = {
    "forward_features": lambda m, x: m.forward_features(x),
    "forward_head": lambda m, x: m.forward_head(m.forward_features(x)),
    "pre_logits": lambda m, x: m.forward_head(m.forward_features(x), pre_logits=True),
    "layers": lambda m, x: m.get_intermediate_layers(x, n=2),
    "layers reshaped": lambda m, x: m.get_intermediate_layers(x, n=[0, 2], reshape=True, norm=True),
    "layers with prefix": lambda m, x: m.get_intermediate_layers(x, n=1, return_prefix_tokens=True),
    "one block": lambda m, x: m.blocks[1](m._pos_embed(m.patch_embed(x))),
    "all blocks": lambda m, x: m.blocks(m._pos_embed(m.patch_embed(x))),
} | {
    f"intermediates {i}": lambda m, x, o=options: m.forward_intermediates(x, **o)
    for i, options in enumerate(INTERMEDIATES)
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_entry_points(variant):
    plain, patched = pair(freeze(vit(variant, dtype=torch.float64), "random 1"))
    x = images(variant, 2, dtype=torch.float64)
    for name, call in ENTRIES.items():
        for training in (True, False):
            try:
                assert_same(step(plain.train(training), x, call), step(patched.train(training), x, call))
            except AssertionError as error:
                raise AssertionError(f"{name}, training={training}") from error


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("variant", ["class_token", "average_pool", "registers", "qk_norm", "gated_mlp"])
def test_masks(variant, fused):
    set_fused_attn(fused)
    try:
        model = vit(variant, dtype=torch.float64, attn_drop_rate=0.2)
    finally:
        set_fused_attn(True)
    plain, patched = pair(freeze(model, "random 3"))
    x = images(variant, 2, dtype=torch.float64)
    for name, options in masks(plain).items():
        for call in (
            lambda m, x, o=options: m(x, **o),
            lambda m, x, o=options: m.forward_features(x, **o),
            lambda m, x, o=options: m.forward_intermediates(x, indices=[0, 2], **o),
        ):
            try:
                assert_same_steps(plain, patched, x, call)
            except AssertionError as error:
                raise AssertionError(name) from error


@pytest.mark.parametrize("options", [{}, DROPOUTS["all"]])
def test_activation_checkpointing(options):
    plain, patched = pair(vit(dtype=torch.float64, **options))
    for model in (plain, patched):
        model.set_grad_checkpointing()
    assert_same_steps(plain, patched, images(dtype=torch.float64))


def test_other_sizes():
    plain, patched = pair(vit("dynamic_size", dtype=torch.float64))
    for height, width in ((SIZE, SIZE), (24, 56), (8, 8)):
        assert_same_steps(plain, patched, torch.randn(2, 3, height, width, dtype=torch.float64))
    for model in (plain, patched):
        model.set_input_size((48, 24))
    assert_same_steps(plain, patched, torch.randn(2, 3, 48, 24, dtype=torch.float64))


def test_changed_head_and_pooling():
    plain, patched = pair(vit("average_pool", dtype=torch.float64))
    x = images(dtype=torch.float64)
    for classes, pool in ((7, None), (3, "token"), (0, ""), (2, "max")):
        for model in (plain, patched):
            torch.manual_seed(1)
            model.reset_classifier(classes, pool)
            model.double()
        assert_same_steps(plain, patched, x)


def test_truncated_model():
    plain, patched = pair(vit(dtype=torch.float64))
    for model in (plain, patched):
        model.prune_intermediate_layers([1], prune_head=False)
    assert_same_steps(plain, patched, images(dtype=torch.float64))


def error(model: nn.Module, x: torch.Tensor, truth: dict[str, torch.Tensor], autocast: bool) -> float:
    """Mean relative error of output and gradients; one that is zero but for rounding counts by the largest's size."""

    def call(model, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(x)

    found = step(model, x, call)
    names = [name for name in truth if name != "random numbers used"]
    whole = max(float(truth[name].norm()) for name in names)
    return sum(
        float((found[name] - truth[name]).norm() / max(float(truth[name].norm()), 1e-3 * whole)) for name in names
    ) / len(names)


@pytest.mark.parametrize("variant", ["class_token", "average_pool", "layer_scale", "qk_norm", "distilled", "gated_mlp"])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_is_as_good_as_before(variant, autocast):
    model = freeze(vit(variant), "random 2")
    truth = step(copy.deepcopy(model).double(), images(variant, 8, dtype=torch.float64))
    dtype = torch.float32 if autocast else torch.bfloat16
    x = images(variant, 8, dtype=dtype)
    before, after = (error(twin, x, truth, autocast) for twin in pair(model.to(dtype)))
    assert after <= 2 * before
    assert after < 0.1


def test_patching_twice_is_patching_once():
    plain, patched = pair(vit(dtype=torch.float64))
    classes = [type(module) for module in patched.modules()]
    assert fastpeft.patch(patched) is patched
    assert classes == [type(module) for module in patched.modules()]
    assert_same_steps(plain, patched, images(dtype=torch.float64))
