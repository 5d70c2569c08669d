"""Rows that a method puts before text: masks, positions, the fusion's split, caches."""

from __future__ import annotations

import pytest
import torch

from fastpeft import FastPEFTError
from fastpeft.models.mplug import DecoderCache
from tests.methods.mplug_models import FEW, METHODS, close, greedy, patched
from tests.models.mplug.tiny import batch


@pytest.mark.parametrize("masked", [True, False])
def test_prompts_lengthen_the_text_and_what_follows(masked):
    model, given = patched("prompt"), batch(dtype=torch.float64)
    mask = given.mask if masked else None
    image = model.encode_image(given.images)
    text = model.encode_text(given.ids, mask)
    assert text.states.shape == (3, 3 + 5, 32)
    v, t = model.fuse(text, image)
    assert v.states.shape == image.states.shape and t.states.shape == text.states.shape
    memory = model.memory(image, given.ids, mask)
    assert memory.states.shape == (3, 5 + 3 + 5, 32)
    if not masked:
        assert text.mask is None and memory.mask is None
    else:
        assert torch.equal(text.mask, torch.cat((torch.ones(3, 3, dtype=torch.bool), given.mask), 1))
        assert torch.equal(memory.mask, torch.cat((torch.ones(3, 5, dtype=torch.bool), text.mask), 1))
    assert model.decode(given.text, None, memory).shape == (3, 6, 61)


@torch.no_grad()
def test_prompts_have_no_positions():
    model = patched("prompt")
    ids = torch.ones(1, 24, dtype=torch.int64)
    memory = model.memory(model.encode_image(torch.randn(1, 3, 32, 32).double()), ids)
    assert model.decode(ids, None, memory).shape == (1, 24, 61)
    with pytest.raises(FastPEFTError, match="a text of 25 tokens is longer than the model's 24"):
        model.encode_text(torch.ones(1, 25, dtype=torch.int64))
    cache = DecoderCache()
    model.decode(ids[:, :20], None, memory, cache)
    model.decode(ids[:, :4], None, None, cache)
    assert cache.length == 24 and cache.layers[0].k.shape[2] == 24 + 3
    with pytest.raises(FastPEFTError, match="a text of 25 tokens is longer"):
        model.decode(ids[:, :1], None, None, cache)


@torch.no_grad()
@pytest.mark.parametrize("name", [*FEW, "prefix by a network", "prefix, keys and values", "vpt"])
def test_generation_with_a_cache(name):
    model = patched(name).eval()
    close(greedy(model, cached=True), greedy(model, cached=False))


@torch.no_grad()
@pytest.mark.parametrize("name", ["prompt", "prefix", "lora"])
@pytest.mark.parametrize("masked", [False, True])
def test_rows_of_a_cache_are_picked(name, masked):
    model, given = patched(name).eval(), batch(dtype=torch.float64)
    index = torch.tensor([2, 1, 1, 0])
    memory = model.memory(model.encode_image(given.images), given.ids, given.mask)
    text, mask = given.text, (given.text != 0 if masked else None)
    whole = model.decode(text, mask, memory)[index]
    cache = DecoderCache()
    model.decode(text[:, :4], mask[:, :4] if masked else None, memory, cache)
    cache.reorder(index)
    rest = model.decode(text[index, 4:], mask[index, 4:] if masked else None, None, cache)
    close(rest, whole[:, 4:], rtol=1e-9, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_order_and_padding(name):
    model, given = patched(name).eval(), batch(dtype=torch.float64)

    def losses(images, ids, mask, text):
        memory = model.memory(model.encode_image(images), ids, mask)
        return model.token_losses(text, memory)[0].sum(1)

    expected = losses(given.images, given.ids, given.mask, given.text)
    order = torch.tensor([1, 2, 0])
    found = losses(given.images[order], given.ids[order], given.mask[order], given.text[order])
    close(found, expected[order], rtol=1e-9, atol=1e-10)
    alone = [
        losses(
            given.images[i : i + 1],
            given.ids[i : i + 1, : given.mask[i].sum()],
            None,
            given.text[i : i + 1, : (given.text[i] != 0).sum()],
        )
        for i in range(3)
    ]
    close(torch.cat(alone), expected, rtol=1e-9, atol=1e-10)
