"""`merge`: the same function in fewer steps, its error measured, and what cannot be folded refused by name."""

from __future__ import annotations

import logging

import pytest
import torch

import fastpeft
from fastpeft import MethodError
from tests.tiny import METHODS, VARIANTS, images, patched, vit

FOLDS = ("lora-q-v", "lora-k", "lora-qkv", "lora-all", "lora-dropout")
BECOMES_KEYS = (
    "vpt-deep",
    "vpt-deep-batch-mask",
    "vpt-share-intra",
    "vpt-share-all",
    "prefix-kv",
    "prefix-mlp",
    "prefix-hidden",
)
REFUSED = {
    "vpt-shallow": r"blocks\.0: prompts whose outputs are carried on",
    "vpt-first-two": r"blocks\.1: prompts whose outputs are carried on",
    "vpt-middle": r"blocks\.1: prompts whose outputs are carried on",
    "adapter": r"blocks\.0\.adapter: a SingleAdapter is not linear",
    "serial": r"blocks\.0\.serial_adapter: .* is not linear",
    "prefix+adapter": r"blocks\.2\.adapter",
    "mlp-3": r"head: hidden layers before the output layer are not linear",
    "bitfit+mlp": r"head: hidden layers",
}


def merged(method, variant="class_token", dtype=torch.float64):
    model = patched(METHODS[method], variant, dtype=dtype).eval()
    x = images(variant, dtype=dtype)
    with torch.no_grad():
        expected = model(x)
    return fastpeft.merge(model), x, expected


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "gated_mlp"])
@pytest.mark.parametrize("method", [*FOLDS, *BECOMES_KEYS, "vpt+lora", "vpt-last-two"])
def test_the_same_function(method, variant):
    model, x, expected = merged(method, variant)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(model.train()(x), expected, rtol=1e-9, atol=1e-11)  # nothing drops out any more
    assert not fastpeft.trainable_parameters(model)


@pytest.mark.parametrize("method", FOLDS)
def test_folded_models_become_plain_ones(method):
    model, x, expected = merged(method)
    assert model.state_dict().keys() == vit().state_dict().keys()
    fastpeft.unpatch(model)
    assert type(model) is type(vit()) and type(model.blocks[0]) is type(vit().blocks[0])
    torch.testing.assert_close(model.eval()(x), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", BECOMES_KEYS)
def test_prompts_become_keys_and_values_that_a_plain_model_cannot_hold(method):
    model, x, expected = merged(method)
    with pytest.raises(MethodError, match="unpatching would lose"):
        fastpeft.unpatch(model)
    assert any(name.endswith((".vpt.k", ".prefix.k")) for name in model.state_dict())
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-11)
    fastpeft.unpatch(model, discard=True)
    assert type(model) is type(vit())


@pytest.mark.parametrize("method", REFUSED)
def test_what_cannot_be_folded_is_named_and_nothing_is_changed(method):
    model = patched(METHODS[method]).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = images()
    expected = model(x)
    with pytest.raises(MethodError, match=REFUSED[method]):
        fastpeft.merge(model)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(x), expected) and fastpeft.trainable_parameters(model)


def test_a_sum_with_one_part_that_cannot_be_folded_is_refused_whole():
    model = patched(METHODS["vpt-shallow+lora"]).eval()
    expected = model(images())
    with pytest.raises(MethodError, match="carried on"):
        fastpeft.merge(model)
    assert torch.equal(model(images()), expected)


def test_a_base_layer_that_is_no_plain_linear():
    model = patched(METHODS["lora-q-v"])
    model.blocks[1].attn.qkv.register_forward_hook(lambda *args: None)
    with pytest.raises(MethodError, match=r"blocks\.1\.lora\.q: its base"):
        fastpeft.merge(model)


@pytest.mark.parametrize(
    "dtype, low, high", [(torch.float64, 0, 1e-13), (torch.float32, 1e-9, 1e-5), (torch.bfloat16, 1e-3, 0.1)]
)
def test_the_error_is_measured_and_reported(dtype, low, high, caplog):
    model = patched(METHODS["lora-all"], dtype=dtype)
    block = model.blocks[0]
    weight = block.attn.proj.weight.detach().double().clone()
    delta = block.lora.o.scale * (block.lora.o.B.double() @ block.lora.o.A.double()).detach()
    with caplog.at_level(logging.INFO, "fastpeft"):
        fastpeft.merge(model)
    errors = fastpeft.summary(model).merged
    assert len(errors) == 3 * 6 and {"blocks.0.o", "blocks.2.fc2"} <= errors.keys()
    assert all(low <= error <= high for error in errors.values())
    actual = float((block.attn.proj.weight.detach().double() - weight - delta).norm() / delta.norm())
    assert errors["blocks.0.o"] == pytest.approx(actual, rel=1e-6)
    assert "merged 18 projections; worst relative error" in caplog.text
    assert "merged      18 projections" in str(fastpeft.summary(model))


def test_a_small_term_is_lost_in_bfloat16_and_the_report_says_so():
    model = vit(dtype=torch.bfloat16)
    fastpeft.patch(model, fastpeft.LoRA(4, targets=("o",)))
    with torch.no_grad():
        for block in model.blocks:
            block.lora.o.A.normal_()
            block.lora.o.B.normal_(std=1e-4 / 2)
    fastpeft.merge(model)
    assert all(error > 0.2 for error in fastpeft.summary(model).merged.values())


def test_a_term_that_is_zero_has_no_error():
    model = fastpeft.merge(fastpeft.patch(vit(), METHODS["lora-q-v"]))
    assert set(fastpeft.summary(model).merged.values()) == {0.0}
    assert all(torch.equal(t, vit().state_dict()[n]) for n, t in model.state_dict().items())


def test_merging_twice_is_merging_once():
    model, x, _ = merged("lora-all")
    once = model(x)
    assert fastpeft.merge(model) is model
    assert torch.equal(model(x), once)


def test_nothing_to_merge():
    for model in (vit(), fastpeft.patch(vit())):
        with pytest.raises(MethodError, match="carries no method to merge"):
            fastpeft.merge(model)


def test_a_merged_model_takes_no_method_and_saves_none(tmp_path):
    model, _, _ = merged("lora-q-v")
    with pytest.raises(MethodError, match="was merged"):
        fastpeft.patch(model, METHODS["vpt-deep"])
    with pytest.raises(MethodError, match=r"save an adapter before fastpeft.merge"):
        fastpeft.save(model, tmp_path)


@pytest.mark.parametrize("method", ["linear", "bitfit", "partial-1"])
def test_methods_without_tensors_in_the_blocks_have_nothing_to_fold(method):
    model, x, expected = merged(method)
    torch.testing.assert_close(model.eval()(x), expected)
    assert fastpeft.summary(model).merged == {}
