"""A batch of no images: no logits, and gradients of zero."""

from __future__ import annotations

import pytest
import torch

import fastpeft
from tests.tiny import CLASSES, METHODS, images, vit

BF16 = torch.bfloat16


@pytest.mark.parametrize("memory", ["fast", "balanced", "small"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("method", ["vpt-deep", "lora-all", "serial", "full"])
def test_a_step(method, dtype, memory):
    model = fastpeft.patch(vit(dtype=dtype), METHODS[method], memory=memory).train()
    logits = model(images().to(dtype)[:0])
    assert logits.shape == (0, CLASSES)
    logits.sum().backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("memory", ["fast", "balanced"])
def test_by_name(memory):
    """The native operators of any CPU."""
    if fastpeft._native.library() is None:
        pytest.skip(f"the native library is {fastpeft._native.status()}")
    model = fastpeft.patch(vit(dtype=BF16), METHODS["serial"], memory=memory, backend="reference").train()
    for _, host in fastpeft.parameters.hosts(model):
        names = ("prompt_attention", "layer_norm", "mlp", "adapter")
        host.fastpeft_host.backends = host.fastpeft_host.backends | dict.fromkeys(names, "cpu")
    logits = model(images().to(BF16)[:0])
    assert logits.shape == (0, CLASSES)
    logits.sum().backward()
