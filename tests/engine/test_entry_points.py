"""Every public way into a model gives token rows of the literal model: features, intermediates, heads, masks, hooks."""

from __future__ import annotations

import pytest
import torch

import fastpeft
from bench import literal
from tests.tiny import FEW, METHODS, fits, images, patched, vit
from tests.twins import literal_of

CARRYING = ("vpt-first-two", "vpt-middle", "vpt-shallow", "vpt-shallow+lora")
CASES = [
    (v, m)
    for v in ("class_token", "no_class_token", "registers", "distilled", "gated_mlp")
    for m in (*FEW, *CARRYING)
    if fits(METHODS[m], v)
]
close = {"rtol": 1e-9, "atol": 1e-12}


def pair(variant, method):
    fused = patched(METHODS[method], variant, dtype=torch.float64).eval()
    twin = literal_of(fused, vit(variant), METHODS[method], torch.float64).eval()
    return fused, twin, images(variant, dtype=torch.float64)


@pytest.mark.parametrize("variant, method", CASES)
def test_features_and_heads(variant, method):
    fused, twin, x = pair(variant, method)
    features = fused.forward_features(x)
    torch.testing.assert_close(features, twin.forward_features(x), **close)
    torch.testing.assert_close(fused.forward_head(features), fused(x), **close)
    pooled = fused.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, twin.forward_head(twin.forward_features(x), pre_logits=True), **close)


@pytest.mark.parametrize("variant, method", CASES)
def test_intermediates(variant, method):
    fused, twin, x = pair(variant, method)
    states = literal.token_states(twin, x)
    options = {"output_fmt": "NLC", "return_prefix_tokens": fused.num_prefix_tokens > 0}
    final, found = fused.forward_intermediates(x, **options)
    torch.testing.assert_close(final, twin.norm(states[-1]), **close)
    found = [torch.cat((p[1], p[0]), dim=1) if isinstance(p, tuple) else p for p in found]
    torch.testing.assert_close(found, states, **close)
    _, last = fused.forward_intermediates(x, indices=1, norm=True)
    assert len(last) == 1 and last[0].shape == (3, 32, 4, 4)
    early = fused.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True, **options)
    expected = states[0][:, fused.num_prefix_tokens :]
    torch.testing.assert_close(early[0][0] if isinstance(early[0], tuple) else early[0], expected, **close)
    named = fused.forward_intermediates(x, indices=[1], output_dict=True, output_fmt="NLC")
    torch.testing.assert_close(named["image_intermediates"][0], states[1][:, fused.num_prefix_tokens :], **close)
    torch.testing.assert_close(fused(x), twin(x), **close)


@pytest.mark.parametrize("method", [*FEW, "vpt-first-two", "lora-dropout"])
@pytest.mark.parametrize(
    "where", ["blocks.2", "blocks.1.attn", "blocks.2.attn.qkv", "blocks.0.norm1", "blocks.2.mlp.fc1", "norm"]
)
def test_a_hook_sees_every_row_and_changes_nothing(where, method):
    fused, twin, x = pair("registers", method)
    expected = twin(x)
    seen = []
    handle = fused.get_submodule(where).register_forward_hook(lambda module, args, out: seen.append(out))
    torch.testing.assert_close(fused(x), expected, **close)
    tokens = 16 + 5
    assert len(seen) == 1 and seen[0].shape[1] >= tokens
    handle.remove()
    torch.testing.assert_close(fused(x), expected, **close)


@pytest.mark.parametrize("where", ["blocks.1", "blocks.1.attn", "blocks.1.attn.proj", "blocks.2.mlp"])
def test_a_hook_may_change_the_output(where):
    plain, x = vit(dtype=torch.float64).eval(), images(dtype=torch.float64)
    model = fastpeft.patch(vit(dtype=torch.float64), METHODS["lora-q-v"]).eval()
    for m in (plain, model):
        m.get_submodule(where).register_forward_hook(lambda module, args, out: 1.5 * out)
    torch.testing.assert_close(model(x), plain(x), **close)


def test_gradients_reach_a_hooked_module():
    # Grad-CAM: activations and gradients of the last block's first norm, all rows.
    fused, twin, x = pair("class_token", "vpt-deep")
    kept = {}
    for name, model in (("fused", fused), ("literal", twin)):

        def keep(module, args, out, name=name):
            out.retain_grad()
            kept[name] = out

        model.blocks[2].norm1.register_forward_hook(keep)
        model(x)[:, 1].sum().backward()
    prompts = METHODS["vpt-deep"].length
    actual, expected = kept["fused"].grad, kept["literal"].grad
    torch.testing.assert_close(actual[:, :1], expected[:, :1], **close)
    torch.testing.assert_close(actual[:, 1:17], expected[:, 1 + prompts :], **close)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("method", ["linear", "lora-all", "adapter", "parallel"])
def test_attention_masks_reach_every_block(method, causal):
    # These methods are the identity at the start, so timm's own model says what is right.
    plain, x = vit(dtype=torch.float64).eval(), images(dtype=torch.float64)
    model = fastpeft.patch(vit(dtype=torch.float64), METHODS[method]).eval()
    mask = None if causal else torch.randn(17, 17, dtype=torch.float64)
    torch.testing.assert_close(
        model(x, attn_mask=mask, is_causal=causal), plain(x, attn_mask=mask, is_causal=causal), **close
    )
    torch.testing.assert_close(
        model.forward_features(x, mask, causal), plain.forward_features(x, mask, causal), **close
    )


def test_everybody_sees_the_prompts_through_a_mask():
    model, x = patched(METHODS["vpt-deep"], dtype=torch.float64).eval(), images(dtype=torch.float64)
    open_mask = torch.ones(17, 17, dtype=torch.bool)
    torch.testing.assert_close(model(x, attn_mask=open_mask), model(x), **close)
    torch.testing.assert_close(model(x, attn_mask=torch.zeros(17, 17).double()), model(x), **close)
    with pytest.raises(fastpeft.MethodError, match="carried from block to block cannot be combined"):
        patched(METHODS["vpt-first-two"], dtype=torch.float64)(x, attn_mask=open_mask)
    with pytest.raises(fastpeft.MethodError, match="carried from block to block"):
        patched(METHODS["vpt-shallow"], dtype=torch.float64)(x, is_causal=True)


def test_separate_predictions_of_a_distilled_model():
    method = METHODS["vpt-deep"]
    fused = patched(method, "distilled", dtype=torch.float64).train()
    fused.set_distilled_training()
    x = images("distilled", dtype=torch.float64)
    found = fused(x)
    twin = literal_of(fused, vit("distilled"), method, torch.float64).train()
    twin.set_distilled_training()
    assert isinstance(found, tuple)
    torch.testing.assert_close(found, twin(x), **close)


def test_no_head():
    for method in ("vpt-deep", "lora-all"):
        fused = patched(METHODS[method], num_classes=0).eval()
        assert fused(images()).shape == (3, 32)


def test_an_empty_batch():
    for method in ("vpt-deep", "vpt-shallow", "lora-dropout", "prefix-kv", "adapter"):
        assert patched(METHODS[method]).train()(images(batch=0)).shape == (0, 5)
