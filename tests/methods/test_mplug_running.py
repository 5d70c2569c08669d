"""How a patched mPLUG runs: dropout, recomputed layers, half precision, compiled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft.models.mplug import DecoderCache
from tests.methods.mplug_models import FEW, METHODS, assert_same, close, greedy, outputs, patched, step
from tests.methods.test_mplug import twins
from tests.models.mplug.tiny import batch, make
from tests.tiny import randomise


@pytest.mark.parametrize("name", ["lora, dropout", "prefix, lora with dropout", "vpt"])
def test_dropout_of_methods_is_drawn_anew_every_step(name):
    model = patched(name)
    one, again = step(model), step(model)
    assert_same(one, again)
    given = batch(dtype=torch.float64)
    losses = []
    fastpeft.set_rng_state(model, seed=0, step=0)
    for _ in range(2):
        memory = model.memory(model.encode_image(given.images), given.ids, given.mask)
        losses.append(model.caption_loss(given.text, memory).item())
    # A forward of the text encoder and one of the decoder.
    assert fastpeft.get_rng_state(model)["step"] == 4
    assert losses[0] == pytest.approx(float(one["loss"]), rel=1e-5) and losses[0] != losses[1]


@pytest.mark.parametrize("name", ["lora", "prompt", "prefix"])
def test_the_frozen_model_rests_while_a_method_trains(name):
    model = patched(name).train()
    assert model.training and not any(m.training for m in model.modules() if isinstance(m, nn.Dropout))
    assert_same(step(model), step(model, seed=1))
    full = fastpeft.patch(make(), fastpeft.Full()).train()
    assert all(m.training for m in full.modules() if isinstance(m, nn.Dropout))


@pytest.mark.parametrize("name", [*FEW, "lora, dropout", "prefix, lora with dropout", "vpt", "full"])
def test_recomputed_blocks(name):
    results, kept = [], []
    for memory in ("fast", "small"):
        model = patched(name)
        fastpeft.patch(model, memory=memory)
        sizes = []

        def pack(t, sizes=sizes):
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            results.append(step(model))
        kept.append(sum(sizes))
    assert_same(results[1], results[0], rtol=1e-9, atol=1e-11)
    assert kept[1] < kept[0]


@pytest.mark.parametrize("name", ["prompt", "prefix", "lora"])
def test_recomputation_leaves_caches_alone(name):
    model, given = patched(name), batch(dtype=torch.float64)
    expected = []
    for memory in ("fast", "small"):
        fastpeft.patch(model, memory=memory)
        memory = model.memory(model.encode_image(given.images), given.ids, given.mask)
        cache = DecoderCache()
        first = model.decode(given.text[:, :4], None, memory, cache)
        loss = (first.sum() + model.decode(given.text[:, 4:], None, None, cache).square().sum()) / 100
        assert cache.length == 6
        expected.append((loss.detach(), *torch.autograd.grad(loss, fastpeft.trainable_parameters(model))))
    for one, other in zip(*expected, strict=True):
        close(one, other)


@pytest.mark.parametrize("name", FEW)
def test_autocast_is_as_exact_as_that_of_the_literal_model(name):
    literal, model = (each.float() for each in twins(METHODS[name]))
    with torch.no_grad():
        for each in (literal, model):
            for parameter in fastpeft.trainable_parameters(each):
                parameter.mul_(0.2)
    exact = step(literal)
    found = []
    for each in (literal, model):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(step(each))
    assert found[1]["loss"].dtype == torch.float32
    assert found[1].keys() == exact.keys()
    for tensor, expected in exact.items():
        wanted, got = ((each[tensor] - expected).norm() for each in found)
        assert got < 2 * wanted + 0.02 * expected.norm(), (tensor, float(wanted), float(got), float(expected.norm()))


@pytest.mark.parametrize("memory", ["fast", "balanced", "small"])
@pytest.mark.parametrize("name", FEW)
def test_half_precision_with_masters(name, memory):
    model = fastpeft.patch(make().bfloat16(), METHODS[name], memory=memory)
    randomise(model, scale=0.05)
    assert all(p.dtype == torch.float32 for p in fastpeft.trainable_parameters(model))
    found, exact = step(model), step(patched(name, double=False, scale=0.05))
    close(found["loss"], exact["loss"], rtol=0.05, atol=0.05)
    trained, expected = (
        torch.cat([each[n].flatten().double() for n in sorted(exact) if n != "loss"]) for each in (found, exact)
    )
    assert (trained - expected).norm() < 0.1 * expected.norm()


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["prefix and lora", pytest.param("prompt and serial", marks=pytest.mark.slow)])
def test_compiled_memory_is_one_graph(name, compiler):
    # A layer of every kind.
    model = patched(name, text_layers=1, fusion_layers=2, stride=1, decoder_layers=1, image_depth=1)
    given = batch(dtype=torch.float64)
    image = model.encode_image(given.images)
    compiled = torch.compile(lambda *args: model.memory(*args).states, backend="eager", fullgraph=True)
    close(compiled(image, given.ids, given.mask), model.memory(image, given.ids, given.mask).states)


@pytest.mark.parametrize("name", ["lora", pytest.param("prompt and serial", marks=pytest.mark.slow)])
def test_compiled_loss(name, compiler):
    model, given = patched(name, text_layers=1, decoder_layers=1, fusion_layers=1), batch(dtype=torch.float64)
    with torch.no_grad():
        memory = model.memory(model.encode_image(given.images), given.ids, given.mask)
    trained = fastpeft.trainable_parameters(model)
    results = []
    for loss in (model.caption_loss, torch.compile(model.caption_loss, backend="eager")):
        value = loss(given.text, memory)
        results.append([value, *torch.autograd.grad(value, trained, allow_unused=True)])
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            close(one, other)


@pytest.mark.parametrize("name", ["prompt", "prefix", "lora"])
def test_inference_mode(name):
    model, expected = patched(name).eval(), outputs(patched(name).eval())
    with torch.inference_mode():
        found = outputs(model)
        text = greedy(model, cached=True)
    assert_same({n: t.clone() for n, t in found.items()}, expected)
    assert torch.equal(text, greedy(model, cached=False))


def test_a_mask_that_is_changed_is_looked_at_again():
    model, given = patched("lora").eval(), batch(dtype=torch.float64)
    mask = given.mask.clone()
    model.encode_text(given.ids, mask)
    mask[0, 3:] = False
    expected = model.encode_text(given.ids, mask.clone()).states
    close(model.encode_text(given.ids, mask).states, expected)
    with torch.inference_mode():
        mask = given.mask.clone()
        model.encode_text(given.ids, mask)
        mask[0, 3:] = False
        close(model.encode_text(given.ids, mask).states, expected)


@pytest.mark.parametrize("hole", [(0, 2), (1, 0)])
def test_masks_with_holes(hole):
    literal, model = twins(METHODS["prefix and lora"])
    given = batch(dtype=torch.float64)
    given.mask[hole] = False
    image = model.encode_image(given.images)
    found, expected = (each.memory(image, given.ids, given.mask) for each in (model, literal))
    close(found.states[found.mask], expected.states[expected.mask])
