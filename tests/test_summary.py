"""`summary` tells what runs how, what is trained and what it weighs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft._native import LEVELS
from fastpeft.ops.choose import Chip, emulated
from tests.tiny import METHODS, VARIANTS, vit


def count(parameters):
    return sum(p.numel() for p in parameters)


@pytest.mark.parametrize("method", METHODS)
def test_numbers_of_parameters(method):
    model = fastpeft.patch(vit(), METHODS[method])
    found = fastpeft.summary(model)
    groups = fastpeft.parameter_groups(model)
    assert found.trainable == count(fastpeft.trainable_parameters(model))
    assert found.head == count(p for _, p in groups["head"]) == 33 * 5
    assert found.total == count(model.parameters())
    assert found.backbone == count(vit().parameters()) - 33 * 5
    assert found.share == pytest.approx(found.trainable / found.total)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_block_is_fused(variant):
    found = fastpeft.summary(fastpeft.patch(vit(variant), METHODS["vpt+bitfit"]))
    assert [path for path, _ in found.fused] == ["blocks.0", "blocks.1", "blocks.2"]
    if variant == "gated_mlp":
        assert found.fused[0][1] == "attention + vpt"
        assert found.left_alone[0] == ("blocks.0.mlp", "not a two-layer MLP; called as a module")
    else:
        assert found.fused[0][1] == "attention + mlp + vpt"
        assert found.left_alone == []


def test_the_method_as_it_is_written_in_code():
    method = fastpeft.VPT(4) + fastpeft.LoRA(2)
    found = fastpeft.summary(fastpeft.patch(vit(), method))
    for part in method.parts():
        assert repr(part) in found.method
    assert fastpeft.summary(fastpeft.patch(vit())).method == "none"


def test_a_model_that_is_not_patched():
    found = fastpeft.summary(vit())
    assert found.fused == [] and found.left_alone == [("", "not patched")] and found.backends == {}
    assert found.trainable == count(vit().parameters())
    assert "left alone  the model: not patched" in str(found)


def test_hooked_blocks_and_strange_layers_are_listed():
    model = fastpeft.patch(vit())
    handle = model.blocks[1].attn.register_forward_hook(lambda *args: None)
    (path, reason), *_ = fastpeft.summary(model).left_alone
    assert path == "blocks.1" and "hooks" in reason
    handle.remove()
    assert fastpeft.summary(model).left_alone == []

    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    odd = Odd(32, 32)
    model.blocks[2].attn.proj = odd
    ((path, reason),) = fastpeft.summary(model).left_alone
    assert path == "blocks.2.attn.proj" and "Odd, which is called as a module" in reason


def test_bytes_count_shared_storage_once():
    model = fastpeft.patch(vit(), fastpeft.VPT(4, share="inter", dropout=0.0))
    assert fastpeft.summary(model).bytes["model"] == 4 * count(model.parameters())
    half = fastpeft.patch(vit(dtype=torch.bfloat16))
    assert fastpeft.summary(half).bytes["model"] == 2 * count(half.parameters())


def test_as_text():
    with emulated(Chip("cpu", list(LEVELS).index("amx"))):
        text = str(fastpeft.summary(fastpeft.patch(vit(), METHODS["vpt-deep"])))
    found = fastpeft.summary(fastpeft.patch(vit(), METHODS["vpt-deep"]))
    assert f"{found.trainable:,} parameters" in text and f"{found.share:.3%}" in text and f"{found.total:,}" in text
    assert "fused       3 blocks: attention + mlp + vpt" in text
    assert "prompt_attention: auto" in text and "lora_linear: reference" in text
    assert len(text.splitlines()) == 5
