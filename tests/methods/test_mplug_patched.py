"""A patched mPLUG is merged, saved, loaded, copied, described and taken back like any model."""

from __future__ import annotations

import copy
import dataclasses
import io

import pytest
import torch

import fastpeft
from fastpeft import FastPEFTError, MethodError, UnsupportedModelError
from fastpeft.models.mplug import MPlug
from fastpeft.models.mplug.layers import BertLayer
from tests.methods.mplug_models import FEW, METHODS, assert_same, greedy, outputs, patched, step
from tests.models.mplug.tiny import make
from tests.tiny import randomise

FOLDS = [name for name in METHODS if name.startswith("lora") and "classifier" not in name]
BECOMES_KEYS = [name for name in METHODS if name.startswith(("prefix", "vpt"))]


@torch.no_grad()
@pytest.mark.parametrize("name", [*FOLDS, *BECOMES_KEYS])
def test_merged_model_is_the_same_function(name):
    model = patched(name).eval()
    expected, text = outputs(model), greedy(model, cached=False)
    fastpeft.merge(model)
    assert_same(outputs(model), expected, rtol=1e-8, atol=1e-9)
    assert torch.equal(greedy(model, cached=True), text)
    assert not fastpeft.trainable_parameters(model)
    names = set(model.state_dict())
    if name in FOLDS:
        assert names == set(make().state_dict())
        fastpeft.unpatch(model)
        assert type(model) is MPlug
        assert_same(outputs(model), expected, rtol=1e-8, atol=1e-9)
    else:
        (kept,) = {n.split(".")[-2] for n in names - set(make().state_dict())}
        assert {n.split(".")[-1] for n in names - set(make().state_dict())} == {"k", "v"}
        with pytest.raises(MethodError, match=f"unpatching would lose {kept}"):
            fastpeft.unpatch(model)


def test_error_of_folding_is_measured_for_every_projection():
    model = fastpeft.merge(patched("lora", double=False).bfloat16())
    errors = fastpeft.summary(model).merged
    assert len(errors) == 2 * (2 + 4 + 2) + 2 * (3 + 2)
    assert "fusion_encoder.encoder.layer.3.cross_k" in errors and "fusion_encoder.encoder.layer.4.cross_k" not in errors
    assert all(0 < error < 0.5 for error in errors.values())


@pytest.mark.parametrize(
    "name, message",
    [
        ("prompt", r"layer\.0\.prompt_tuning: rows before the input of a stack are rows of every text"),
        ("serial", r"layer\.0\.serial_adapter: a Adapters is not linear"),
    ],
)
def test_what_cannot_be_folded(name, message):
    model = patched(name)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MethodError, match=message):
        fastpeft.merge(model)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


FOLDED = {
    "prefix by a network": fastpeft.PrefixTuning(3, form="hidden"),
    "prefix, keys and values by a network": fastpeft.PrefixTuning(3),
    "a network on some stacks, lora": fastpeft.PrefixTuning(2, form="hidden", stacks=("text", "decoder"))
    + fastpeft.LoRA(2, targets=("q", "k")),
    "a network in the tower, lora": fastpeft.PrefixTuning(2, stacks="image") + fastpeft.LoRA(2, targets=("q", "k")),
    "a network in the tower and elsewhere, lora": fastpeft.PrefixTuning(2, form="hidden", stacks=("image", "text"))
    + fastpeft.LoRA(2, targets=("q", "k")),
}


@pytest.mark.parametrize("name", FOLDED)
def test_a_folded_prefix_is_saved_and_loaded_without_its_network(name, tmp_path):
    if name in METHODS:
        model = patched(name).eval()
    else:
        prefix, lora = FOLDED[name].parts()
        network = dataclasses.replace(prefix, mlp=5)
        model = randomise(fastpeft.patch(make(), network + lora).double(), scale=0.3).eval()
    expected = outputs(model)
    assert fastpeft.fold_prefix(model) is model
    assert_same(outputs(model), expected)
    assert fastpeft.summary(model).method == " + ".join(map(repr, FOLDED[name].parts()))
    plain = fastpeft.patch(make().double(), FOLDED[name])
    shapes = {n: (t.shape, t.requires_grad) for n, t in plain.named_parameters()}
    assert {n: (t.shape, t.requires_grad) for n, t in model.named_parameters()} == shapes
    fastpeft.save(model.float(), tmp_path / "out")
    loaded = fastpeft.load(make(), tmp_path / "out").eval()
    assert_same(outputs(loaded, torch.float32), outputs(model, torch.float32), rtol=0, atol=0)
    expected = outputs(loaded.double())
    assert step(loaded)["loss"].isfinite(), "what is left can be trained on"
    assert_same(outputs(fastpeft.merge(loaded.eval())), expected, rtol=1e-8, atol=1e-9)


def test_what_has_no_network_to_fold():
    for model in (make(), patched("prefix"), patched("lora")):
        with pytest.raises(MethodError, match="carries no prefix with a network to fold"):
            fastpeft.fold_prefix(model)
    with pytest.raises(MethodError, match="was merged, and the network with it"):
        fastpeft.fold_prefix(fastpeft.merge(patched("prefix by a network")))


# Saving, copying, taking back.


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in METHODS if n != "full"])
def test_saved_and_loaded(name, tmp_path):
    model = patched(name, double=False)
    for parameter in fastpeft.trainable_parameters(model):
        parameter.add_(0.1 * torch.randn_like(parameter))
    fastpeft.save(model, tmp_path / "out")
    loaded = fastpeft.load(make(), tmp_path / "out")
    assert fastpeft.summary(loaded).method == fastpeft.summary(model).method
    expected = model.eval().state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    assert_same(outputs(loaded.eval(), torch.float32), outputs(model, torch.float32), rtol=0, atol=0)


def test_an_adapter_of_another_base(tmp_path):
    fastpeft.save(patched("lora", double=False), tmp_path / "out")
    with pytest.raises(FastPEFTError, match="was trained on another base than this MPlug"):
        fastpeft.load(make(seed=5), tmp_path / "out")


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_unpatched_model_is_as_before(name):
    model = make().double()
    model.text_encoder.embeddings.word_embeddings.weight.requires_grad_(False)
    kept = [dict(module.__dict__) for module in model.modules()]
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    expected, classes = outputs(model), [type(module) for module in model.modules()]
    fastpeft.patch(model, METHODS[name])
    outputs(model.double())
    fastpeft.unpatch(model, discard=True)
    assert [type(module) for module in model.modules()] == classes
    assert [module.__dict__.keys() for module in model.modules()] == [before.keys() for before in kept]
    assert {n: p.requires_grad for n, p in model.named_parameters()} == required
    assert_same(outputs(model), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", FEW)
def test_copies(name):
    model = patched(name)
    twin = copy.deepcopy(model)
    expected = step(model)
    assert_same(step(twin), expected)
    with torch.no_grad():
        for parameter in fastpeft.trainable_parameters(twin):
            parameter.zero_()
    assert_same(step(model), expected)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    assert_same(step(torch.load(stored, weights_only=False)), expected)


def test_summary():
    model = fastpeft.patch(make(), METHODS["prefix and lora"])
    found = fastpeft.summary(model)
    assert found.method == " + ".join(map(repr, METHODS["prefix and lora"].parts()))
    fused = dict(found.fused)
    assert len(fused) == 2 + 4 + 2 + 2 and found.left_alone == []
    assert fused["visual_encoder.blocks.0"] == "attention + mlp"
    assert fused["text_encoder.encoder.layer.0"] == "attention + mlp + prefix + lora"
    assert fused["fusion_encoder.encoder.layer.3"] == "attention + cross-attention + mlp + prefix + lora"
    assert fused["fusion_encoder.encoder.layer.4"] == "attention + mlp + prefix + lora"
    assert found.trainable == sum(p.numel() for p in fastpeft.trainable_parameters(model))
    assert found.total == found.trainable + sum(p.numel() for p in make().parameters())
    assert found.backbone == found.total - found.trainable and found.head == 0
    assert set(fastpeft.parameter_groups(model)) == {"prefix", "lora"}
    assert "fused       10 blocks" in str(found)


def test_a_plain_patch_changes_nothing():
    model = make(dropout=0.0, attention_dropout=0.0).double()
    twin = fastpeft.patch(copy.deepcopy(model))
    assert model.state_dict().keys() == twin.state_dict().keys()
    assert_same(step(twin), step(model))
    assert isinstance(twin, MPlug) and isinstance(twin.text_encoder.encoder.layer[0], BertLayer)


def test_every_patched_class_of_blocks_is_the_engines():
    model = patched("lora")
    names = [path for path, _ in model.fastpeft_host.spec.blocks]
    assert names == [
        *(f"text_encoder.encoder.layer.{n}" for n in (0, 1)),
        *(f"fusion_encoder.encoder.layer.{n}" for n in (2, 3, 4, 5)),
        *(f"text_decoder.bert.encoder.layer.{n}" for n in (0, 1)),
    ]
    with pytest.raises(FastPEFTError, match="the model already carries LoRA"):
        fastpeft.patch(model, fastpeft.LoRA(4))


def test_structure_is_read_again():
    model = patched("prefix and lora").eval()
    expected = outputs(model)
    assert_same(outputs(fastpeft.refresh(model)), expected)
    model.text_decoder.bert.encoder.layer = model.text_decoder.bert.encoder.layer[:1]
    with pytest.raises(UnsupportedModelError, match="the model has other blocks than when it was patched"):
        fastpeft.refresh(model)
