"""What the engine cannot run is an error that names it, or is left alone and listed; it is never run wrongly."""

from __future__ import annotations

import pytest
import torch
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastpeft
from tests.dropin.both import assert_same_state, assert_same_steps, pair
from tests.tiny import DIM, images, vit


def block(kind: type) -> dict:
    """Options of a model of other blocks."""
    return {"block_fn": kind}


BLOCKS = {
    "ResPostBlock": block(ResPostBlock),
    "ParallelScalingBlock": block(ParallelScalingBlock),
    "DiffParallelScalingBlock": block(DiffParallelScalingBlock),
    "ParallelThingsBlock": block(ParallelThingsBlock),
    "DiffAttention": {"attn_layer": "diff"},
}


def resnet() -> nn.Module:
    """A network without transformer blocks."""
    return ResNet(BasicBlock, layers=(1, 1, 1, 1), channels=(8, 8, 8, 8), num_classes=3).double()


@pytest.mark.parametrize("kind", BLOCKS)
def test_other_blocks(kind):
    model = vit(dtype=torch.float64, **BLOCKS[kind])
    with pytest.raises(fastpeft.UnsupportedModelError, match=rf"blocks\.0: .*{kind}.*strict=False"):
        fastpeft.patch(model)
    assert type(model) is VisionTransformer
    plain, patched = pair(model, strict=False)
    left = fastpeft.summary(patched).left_alone
    assert [path for path, _ in left] == ["blocks.0", "blocks.1", "blocks.2"]
    assert all(kind in reason for _, reason in left)
    assert fastpeft.summary(patched).fused == []
    assert_same_steps(plain, patched, images(dtype=torch.float64))
    with pytest.raises(fastpeft.MethodError, match=r"blocks\.0 is left alone"):
        fastpeft.patch(patched, fastpeft.VPT(2))
    assert_same_state(plain, fastpeft.unpatch(patched))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_other_block_among_them(checkpointing):
    model = vit(dtype=torch.float64)
    model.blocks[1] = ResPostBlock(DIM, 2, init_values=0.1).double()
    model.set_grad_checkpointing(checkpointing)
    with pytest.raises(fastpeft.UnsupportedModelError, match=r"blocks\.1: a ResPostBlock"):
        fastpeft.patch(model)
    plain, patched = pair(model, strict=False)
    assert [path for path, _ in fastpeft.summary(patched).fused] == ["blocks.0", "blocks.2"]
    assert [path for path, _ in fastpeft.summary(patched).left_alone] == ["blocks.1"]
    x = images(dtype=torch.float64)
    for call in (lambda m, x: m(x), lambda m, x: m(x, is_causal=True), lambda m, x: m.forward_intermediates(x)):
        assert_same_steps(plain, patched, x, call)
    assert_same_state(plain, fastpeft.unpatch(patched))


@pytest.mark.parametrize("wrap", [lambda m: m, nn.Sequential])
def test_no_transformer_at_all(wrap):
    model = wrap(resnet())
    name = type(model).__name__
    with pytest.raises(fastpeft.UnsupportedModelError, match=f"no transformer that fastpeft knows in {name}"):
        fastpeft.patch(model)
    plain, patched = pair(model, strict=False)
    assert "no transformer" in fastpeft.summary(patched).left_alone[0][1]
    assert_same_steps(plain, patched, torch.randn(2, 3, 32, 32, dtype=torch.float64))
    with pytest.raises(fastpeft.MethodError, match="a method goes to one transformer, but the model has 0"):
        fastpeft.patch(patched, fastpeft.LoRA(2), strict=False)


class OwnFeatures(VisionTransformer):
    """Does something else with the blocks."""

    def forward_features(self, x, attn_mask=None, is_causal=False):
        return super().forward_features(x) * 2


class LastRow(VisionTransformer):
    """Reads another row than the class token."""

    def forward_head(self, x, pre_logits=False):
        return self.head(x[:, -1])


class OwnPool(VisionTransformer):
    """Pools in a way of its own."""

    def pool(self, x, pool_type=None):
        return x.mean(1) + x[:, 3]


def test_a_forward_of_its_own():
    model = vit(cls=OwnFeatures, dtype=torch.float64)
    with pytest.raises(fastpeft.UnsupportedModelError, match="OwnFeatures has a forward_features of its own"):
        fastpeft.patch(model)
    plain, patched = pair(model, strict=False)
    assert "forward_features" in str(fastpeft.summary(patched))
    assert_same_steps(plain, patched, images(dtype=torch.float64))


@pytest.mark.parametrize("kind", [LastRow, OwnPool])
def test_a_readout_of_its_own_gets_every_row(kind):
    assert_same_steps(*pair(vit(cls=kind, dtype=torch.float64)), images(dtype=torch.float64))


def test_functions_replaced_on_the_instance():
    plain, patched = pair(vit(dtype=torch.float64))
    for model in (plain, patched):
        model.pool = lambda x, pool_type=None: x[:, 2]
    assert_same_steps(plain, patched, images(dtype=torch.float64))
    model = vit()
    model.forward_features = lambda x: x.mean(1)
    with pytest.raises(fastpeft.UnsupportedModelError, match="forward_features of its own"):
        fastpeft.patch(model)


class Mixing(nn.Module):
    """An MLP in which every row depends on all the others, and on random numbers in training."""

    def __init__(self, in_features, hidden_features, **options):
        super().__init__()
        self.fc1 = nn.Linear(in_features, in_features)

    def forward(self, x):
        noise = torch.rand_like(x) if self.training else 1
        return self.fc1(x) * noise + x.mean(1, keepdim=True)


class Normalising(nn.Linear):
    """A linear layer that scales all rows together, as dynamic quantisation does."""

    def forward(self, x):
        return super().forward(x / x.abs().amax())


def test_an_mlp_that_mixes_rows():
    plain, patched = pair(vit(mlp_layer=Mixing, dtype=torch.float64))
    assert ("blocks.0.mlp", "not a two-layer MLP; called as a module") in fastpeft.summary(patched).left_alone
    assert_same_steps(plain, patched, images(dtype=torch.float64))


@pytest.mark.parametrize("path", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
@pytest.mark.parametrize("variant", ["class_token", "gated_mlp"])
def test_a_linear_layer_of_another_kind(variant, path):
    model = vit(variant, dtype=torch.float64)
    for layer in (m.get_submodule(path) for m in model.blocks):
        layer.__class__ = Normalising
    plain, patched = pair(model)
    assert_same_steps(plain, patched, images(variant, dtype=torch.float64))
    if variant == "class_token":
        assert ("blocks.2." + path) in dict(fastpeft.summary(patched).left_alone)


def test_a_layer_without_sizes():
    model = vit(dtype=torch.float64)
    for inner in model.blocks:
        inner.attn.qkv, inner.attn.proj = nn.Sequential(inner.attn.qkv), nn.Sequential(inner.attn.proj)
        inner.mlp.fc1 = nn.Sequential(inner.mlp.fc1)
    assert_same_steps(*pair(model), images(dtype=torch.float64))


def parametrised() -> nn.Module:
    """A model whose weights are computed from others, in three ways."""
    model = vit(dtype=torch.float64)
    torch.manual_seed(1)
    parametrizations.weight_norm(model.blocks[1].attn.qkv)
    parametrizations.spectral_norm(model.blocks[2].mlp.fc1)
    prune.random_unstructured(model.blocks[0].attn.proj, "weight", 0.5)
    return model


def test_parametrised_weights():
    plain, patched = parametrised(), fastpeft.patch(parametrised())
    left = dict(fastpeft.summary(patched).left_alone)
    assert "parametrised" in left["blocks.1.attn.qkv"] and "hooks" in left["blocks.0.attn.proj"]
    assert_same_steps(plain, patched, images(dtype=torch.float64))


def test_wrong_arguments():
    with pytest.raises(fastpeft.FastPEFTError, match=r"backend must be one of auto, reference, .*, got 'cudnn'"):
        fastpeft.patch(vit(), backend="cudnn")
    with pytest.raises(fastpeft.MethodError, match=r"such as fastpeft.VPT\(length=50\), got 'vpt'"):
        fastpeft.patch(vit(), "vpt")
