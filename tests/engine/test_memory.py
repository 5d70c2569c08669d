"""What a step keeps under each setting of `memory`, and that it stays the same step."""

from __future__ import annotations

import copy

import pytest
import torch

import fastpeft
from bench.memory import saved_bytes
from fastpeft import FastPEFTError
from tests.kernels.close import error
from tests.tiny import METHODS, images, patched, timm, vit


def step(model, x):
    logits = model(x)
    torch.manual_seed(5)
    (logits * torch.randn_like(logits)).sum().backward()
    return {"logits": logits.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["vpt-deep", "lora-q-v", "adapter", "vpt-shallow-dropout", "full"])
def test_recomputed_blocks_give_the_same_gradients(method):
    model = patched(METHODS[method]).train()
    twin = copy.deepcopy(model)
    fastpeft.patch(model, memory="small")
    expected = step(twin, images())
    for name, value in step(model, images()).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", ["vpt-deep", "lora-q-v", "adapter"])
def test_eight_bits_of_a_derivative_cost_little_accuracy(method):
    ours, plain = {}, {}
    for draw in range(4):
        model = patched(METHODS[method], seed=draw).train()
        exact = step(copy.deepcopy(model).double(), images(seed=draw).double())
        for errors, memory in ((ours, "balanced"), (plain, "fast")):
            fastpeft.patch(twin := copy.deepcopy(model), memory=memory)
            with torch.autocast("cpu", torch.bfloat16):
                found = step(twin, images(seed=draw))
            for name, value in found.items():
                errors[name] = errors.get(name, 0.0) + error(value, exact[name])
    wrong = {name: (ours[name], plain[name]) for name in ours if not ours[name] <= 2 * plain[name]}
    assert not wrong, "relative errors (balanced, fast), summed over draws"
    assert any(ours[name] != plain[name] for name in ours), "the derivative was not kept in eight bits"


def kept(memory, dtype=torch.bfloat16, method="vpt-deep"):
    # The operators' composition; what whole branches keep is tested with them.
    model = vit(dtype=dtype, embed_dim=64)
    model = fastpeft.patch(model, METHODS[method], backend="reference", memory=memory).train()
    x = images(batch=8).to(dtype)
    return saved_bytes(lambda: model(x), model)


def test_each_setting_keeps_less_than_the_one_before():
    fast, balanced, small = (kept(memory) for memory in ("fast", "balanced", "small"))
    # Two blocks of 17 tokens and the last one's class token, 8 images, 256 units: one byte each instead of two.
    assert fast - balanced == (2 * 17 + 1) * 8 * 256
    assert small < 0.5 * balanced


WAYS = {
    "a mask": lambda model, x: model(x, attn_mask=torch.ones(17, 17, dtype=torch.bool)),
    "causal": lambda model, x: model.forward_features(x, is_causal=True),
    "intermediates": lambda model, x: model.forward_intermediates(x)[0],
    "intermediates with a mask": lambda model, x: model.forward_intermediates(x, is_causal=True, output_fmt="NLC")[0],
    "a hook on the blocks": lambda model, x: model(x),
}


REACHED = [(way, method) for way in WAYS for method in ("linear", "vpt-deep", "lora-dropout")]
# Prompts that are carried on take no mask.
REACHED += [(way, "vpt-first-two") for way in ("intermediates", "a hook on the blocks")]


@pytest.mark.parametrize("way, method", REACHED)
def test_blocks_are_recomputed_whichever_way_they_are_reached(way, method):
    found, seen = {}, []
    for memory in ("fast", "small"):
        model = patched(METHODS[method], embed_dim=64).train()
        # Something in every block is trained, so that every block keeps something.
        model.blocks.requires_grad_(True)
        fastpeft.patch(model, memory=memory, backend="reference")
        fastpeft.set_rng_state(model, seed=3, step=0)
        if "hook" in way:
            model.blocks.register_forward_hook(lambda module, args, out: seen.append(out.shape))
        size = saved_bytes(lambda model=model: WAYS[way](model, images(batch=8)), model)
        fastpeft.set_rng_state(model, seed=3, step=0)
        model.zero_grad()
        WAYS[way](model, images(batch=8)).square().sum().backward()
        found[memory] = size, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found["small"][0] < 0.6 * found["fast"][0]
    assert found["small"][1].keys() == found["fast"][1].keys()
    for name, value in found["small"][1].items():
        torch.testing.assert_close(value, found["fast"][1][name], rtol=1e-4, atol=1e-5, msg=name)
    assert len(seen) == 4 * ("hook" in way), "the hook fires once a forward, and not when blocks are run again"


def test_blocks_that_the_engine_leaves_alone_are_called_as_they_are():
    model = vit()
    model.blocks[1] = timm.models.vision_transformer.ParallelScalingBlock(32, 2)
    twin = copy.deepcopy(model)
    fastpeft.patch(model, strict=False, memory="small")
    for way in WAYS.values():
        torch.testing.assert_close(way(model, images()), way(twin, images()), rtol=1e-4, atol=1e-5)


def test_full_precision_keeps_its_full_derivative():
    assert kept("balanced", torch.float32) == kept("fast", torch.float32)


def test_a_trained_mlp_keeps_what_it_needs():
    assert kept("balanced", method="bitfit") == kept("fast", method="bitfit")


def test_a_later_patch_changes_the_setting_and_only_if_told():
    model = fastpeft.patch(vit(), memory="small")
    assert fastpeft.patch(model, METHODS["vpt-deep"]).fastpeft_host.memory == "small"
    assert fastpeft.patch(model, memory="fast").fastpeft_host.memory == "fast"
    with pytest.raises(FastPEFTError, match="memory must be one of fast, balanced, small, got 'tiny'"):
        fastpeft.patch(model, memory="tiny")
