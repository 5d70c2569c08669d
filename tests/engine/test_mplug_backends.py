"""mPLUG on Triton's kernels, interpreted, against mPLUG on the reference; and which kernels ran.

One layer of every kind, as on a GPU: padding is a mask there, where the CPU looks for lengths.
"""

from __future__ import annotations

import copy

import pytest
import torch

import fastpeft
from fastpeft.engine import post_norm
from fastpeft.models.mplug import Generation, Stream
from tests.kernels.close import error
from tests.methods.mplug_models import METHODS
from tests.models.mplug.tiny import batch, make
from tests.thinned import sampled
from tests.tiny import randomise

pytest.importorskip("triton")

# Method -> operators that ran on kernels, all others having run on the reference.
_COMMON = {"prompt_attention", "layer_norm", "mlp"}
REACHES = {
    "prompt": _COMMON,
    "prefix": _COMMON,
    "lora": _COMMON | {"lora_linear"},
    "serial": _COMMON | {"adapter"},
    "parallel": _COMMON | {"adapter"},
}
BOUND = 1e-4


@pytest.fixture(autouse=True)
def masks(monkeypatch):
    """Padding as a GPU sees it."""
    monkeypatch.setattr(post_norm, "lengths_of", lambda mask: None)


def pair(name):
    """The model on kernels, and its twin on the reference."""
    sizes = {"text_layers": 1, "fusion_layers": 2, "stride": 1, "decoder_layers": 1, "image_depth": 1}
    model = randomise(fastpeft.patch(make(**sizes), METHODS[name]), scale=0.3)
    twin = copy.deepcopy(model)
    return fastpeft.patch(model, backend="triton"), fastpeft.patch(twin, backend="reference")


def losses(model, image: Stream) -> dict[str, torch.Tensor]:
    """Both tasks' losses, of padded prompts and questions, captions and answers."""
    given = batch()
    memory = model.memory(image, given.ids, given.mask)
    weights, counts = torch.tensor([0.3, 0.7, 1.0, 1.0]), torch.tensor([1, 2, 1])
    return {
        "caption": model.caption_loss(given.text, memory),
        "vqa": model.vqa_loss(given.text[[0, 1, 2, 2], :5], weights, counts, memory),
    }


def gradients(model, loss) -> dict[str, torch.Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    wrong = {name: error(value, expected[name]) for name, value in found.items()}
    assert max(wrong.values()) <= BOUND, {name: value for name, value in wrong.items() if value > BOUND}


def image_of(twin) -> Stream:
    """The tower's rows, by the reference: what is counted is the text's and the decoder's own."""
    with torch.no_grad():
        return twin.encode_image(batch().images)


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(REACHES, 2))
def test_a_step_on_the_kernels_is_the_references(name, calls):
    model, twin = (each.train() for each in pair(name))
    image = image_of(twin)
    expected = losses(twin, image)
    slopes = gradients(twin, sum(expected.values()))
    assert not calls["forward"] and not calls["backward"]
    found = losses(model, image)
    assert_same({n: v.detach() for n, v in found.items()}, {n: v.detach() for n, v in expected.items()})
    assert calls["forward"] == REACHES[name]
    assert_same(gradients(model, sum(found.values())), slopes)
    assert calls["backward"] == REACHES[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(REACHES, 2, first=1))
def test_a_search_on_the_kernels_is_the_references(name, calls):
    model, twin = (each.eval() for each in pair(name))
    given, image = batch(), image_of(twin)
    settings = Generation(beams=2, min_length=2, max_length=4)
    texts = []
    for each in (twin, model):
        assert not calls["forward"]
        with torch.no_grad():
            memory = each.memory(image, given.ids, given.mask)
            texts.append(each.generate(memory, settings))
    for ours, theirs in zip(*texts, strict=True):
        assert [one.ids for one in ours] == [one.ids for one in theirs]
        assert [one.score for one in ours] == pytest.approx([one.score for one in theirs], abs=1e-4)
    assert calls["forward"] == REACHES[name] and not calls["backward"]


def test_a_decoders_step_on_the_kernels_is_the_references(calls):
    """The cheapest of them: one layer, a padded memory that the reference made."""
    model, twin = pair("prefix")
    given = batch()
    with torch.no_grad():
        memory = twin.memory(image_of(twin), given.ids, given.mask)
    assert not memory.mask.all()
    results = []
    for each in (twin, model):
        assert not calls["forward"]
        loss = each.caption_loss(given.text, memory)
        rows = each.text_decoder.bert.encoder.layer[0].prefix.prompts
        results.append({"loss": loss.detach(), "prompts": torch.autograd.grad(loss, rows)[0]})
    assert_same(*reversed(results))
    assert calls["forward"] == calls["backward"] == REACHES["prefix"]
