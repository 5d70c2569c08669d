"""Activation checkpointing: what is computed again is what was computed, dropout masks included."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastpeft
from tests.tiny import METHODS, images, patched
from tests.twins import step


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_the_same(method):
    x = images(dtype=torch.float64)
    results = []
    for enable in (False, True):
        model = patched(METHODS[method], dtype=torch.float64).train()
        fastpeft.set_rng_state(model, seed=1, step=0)
        model.set_grad_checkpointing(enable)
        results.append(step(model, x))
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name


@pytest.mark.parametrize("method", ["vpt-deep", "lora-dropout"])
def test_another_forward_before_the_backward_does_not_change_the_masks(method):
    x = images(dtype=torch.float64)
    results = []
    for between in (False, True):
        model = patched(METHODS[method], dtype=torch.float64).train()
        model.set_grad_checkpointing()
        fastpeft.set_rng_state(model, seed=1, step=0)
        out = model(x)
        if between:
            model(2 * x)
        out.sum().backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name


@pytest.mark.parametrize("entry", ["forward_features", "forward_intermediates"])
@pytest.mark.parametrize("method", ["vpt-deep", "vpt-first-two", "lora-dropout"])
def test_other_entry_points(method, entry):
    x = images(dtype=torch.float64).requires_grad_()
    results = []
    for enable in (False, True):
        model = patched(METHODS[method], dtype=torch.float64).train()
        fastpeft.set_rng_state(model, seed=1, step=0)
        model.set_grad_checkpointing(enable)
        out = getattr(model, entry)(x)
        out = out if entry == "forward_features" else out[0]
        model.forward_features(x)  # moves the counter on
        (out**2).sum().backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys() and results[0]
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, msg=lambda m, n=name: f"{n}: {m}")


def test_the_user_may_checkpoint_a_block():
    model = patched(METHODS["vpt-deep"], dtype=torch.float64).train()
    block, x = model.blocks[1], torch.randn(2, 17, 32, dtype=torch.float64)
    block(x).sum().backward()
    expected = block.vpt.prompts.grad.clone()
    model.zero_grad()
    checkpoint(block, x, use_reentrant=False).sum().backward()
    assert torch.equal(block.vpt.prompts.grad, expected)


def test_less_is_kept():
    kept = []
    for enable in (False, True):
        model = patched(METHODS["vpt-deep"]).train()
        model.set_grad_checkpointing(enable)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            model(images())
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
        kept.append(sum(storages.values()))
    assert kept[1] < kept[0] / 3
