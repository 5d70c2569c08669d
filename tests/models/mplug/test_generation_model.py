"""Generation with the model itself: caches, beams that share a memory, masks and start tokens."""

from __future__ import annotations

import copy

import pytest
import torch

import fastpeft
from bench.literal.mplug import apply_to_mplug
from fastpeft.errors import FastPEFTError
from fastpeft.models.mplug import DecoderCache, Generation, MPlug, MPlugConfig, Stream, rank_answers
from tests.models.mplug.test_generation import plain_search, same

START, END, VOCABULARY = 1, 0, 11
CONFIG = MPlugConfig(
    image_size=32,
    image_width=48,
    image_depth=1,
    image_heads=2,
    vocab_size=VOCABULARY,
    width=32,
    num_heads=4,
    intermediate=48,
    max_positions=16,
    text_layers=1,
    fusion_layers=2,
    decoder_layers=2,
    pad_id=2,
    cls_id=START,
    sep_id=END,
)


@pytest.fixture(scope="module")
def model():
    """Double precision, and weights large enough that what is said depends on everything."""
    torch.manual_seed(0)
    model = MPlug.from_config(CONFIG).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and not name.startswith("visual_encoder"):
                p.mul_(20)
        model.text_decoder.cls.predictions.bias.normal_()
        model.text_decoder.cls.predictions.bias[END] += 2
    return model


@pytest.fixture(scope="module")
def memory(model):
    """Four images with questions of different lengths."""
    g = torch.Generator().manual_seed(2)
    images = torch.randn(4, 3, 32, 32, generator=g, dtype=torch.double)
    ids = torch.randint(3, VOCABULARY, (4, 6), generator=g)
    mask = torch.arange(6) < torch.tensor([6, 2, 4, 3])[:, None]
    with torch.no_grad():
        return model.memory(model.encode_image(images), ids, mask)


class Uncached:
    """What `plain_search` asks for, by running whole texts."""

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def logits(self, ids, memory):
        return self.model.decode(ids, None, memory)


def part(memory, *examples):
    return Stream(memory.states[list(examples)], memory.mask[list(examples)])


@pytest.mark.parametrize("start", [[START], [START, 5, 7]], ids=["start", "prompt"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("beams", [1, 4])
def test_caches_change_nothing(model, memory, beams, frozen, start):
    settings = Generation(beams=beams, min_length=1, max_length=9, frozen_beams=frozen)
    got = model.generate(memory, settings, torch.tensor(start))
    for example in range(4):
        same(got[example], plain_search(Uncached(model), part(memory, example), settings, start))
    assert len({found[0].ids for found in got}) > 1, "memory does not matter"
    assert len({len(found[0].ids) for found in got}) > 1, "all end at once"


def test_order_company_and_padding(model, memory):
    settings = Generation(beams=3, min_length=1, max_length=9)
    together = model.generate(memory, settings)
    backwards = model.generate(part(memory, 3, 2, 1, 0), settings)
    padded = Stream(
        torch.cat((memory.states, torch.full((4, 3, 32), 9.0)), 1),
        torch.cat((memory.mask, torch.zeros(4, 3).bool()), 1),
    )
    longer = model.generate(padded, settings)
    for example in range(4):
        expected = [(h.ids, h.score) for h in model.generate(part(memory, example), settings)[0]]
        for found in (together[example], backwards[3 - example], longer[example]):
            same(found, expected)


@torch.no_grad()
def test_beams_share_a_row_of_the_memory(model, memory):
    settings = Generation(beams=4, min_length=1, max_length=5)
    seen = []
    decode = model.decode

    def watched(ids, mask, memory, cache):
        logits = decode(ids, mask, memory, cache)
        seen.append((len(ids), cache.layers[0].k.shape[0], cache.layers[0].memory_k.shape[0]))
        return logits

    model.decode = watched
    try:
        model.generate(memory, settings)
    finally:
        del model.decode
    assert seen[0] == (4, 4, 4) and seen[1] == (16, 16, 4)
    assert all(rows == own == 4 * shared for rows, own, shared in seen[1:])


@torch.no_grad()
def test_a_shared_memory_is_a_repeated_one(model, memory):
    ids = torch.randint(3, VOCABULARY, (12, 3))
    shared, own = DecoderCache(), DecoderCache()
    for cache in (shared, own):
        model.decode(torch.full((4, 1), START), None, memory, cache)
    rows = torch.arange(4).repeat_interleave(3)
    shared.reorder_text(rows)
    own.reorder(rows)
    torch.testing.assert_close(model.decode(ids, None, None, shared), model.decode(ids, None, None, own))
    assert own.layers[0].memory_k.shape[0] == own.memory_mask.shape[0] == 12
    assert shared.layers[0].memory_k.shape[0] == shared.memory_mask.shape[0] == 4


def test_ranking(model, memory):
    answers = [(3, END), (4, 5, 6, END), (7, END), (END,), (8, 8, END)]
    for example, found in enumerate(rank_answers(model, memory, answers)):
        assert sorted(number for number, _ in found) == [0, 1, 2, 3, 4]
        for number, value in found:
            ids = torch.tensor([[START, *answers[number]]])
            logp = Uncached(model).logits(ids[:, :-1], part(memory, example)).log_softmax(-1)
            assert value == pytest.approx(logp.gather(2, ids[:, 1:, None]).sum().item())


def test_the_models_positions(model, memory):
    settings = Generation(beams=2, min_length=15, max_length=16)
    assert len(model.generate(memory, settings)[0][0].ids) == 16
    with pytest.raises(FastPEFTError, match="2 start tokens and 16 generated ones need 17 positions, the model has 16"):
        model.generate(memory, settings, torch.tensor([START, 3]))


def test_bf16(model, memory):
    half = copy.deepcopy(model).bfloat16()
    settings = Generation(beams=3, max_length=6)
    found = half.generate(Stream(memory.states.bfloat16(), memory.mask), settings)
    for example in range(4):
        for ids, value in found[example]:
            text = torch.tensor([[START, *ids]])
            logp = Uncached(model).logits(text[:, :-1], part(memory, example)).log_softmax(-1)
            exact = logp.gather(2, text[:, 1:, None]).sum().item() / settings.penalty(len(ids) - 1)
            assert value == pytest.approx(exact, rel=0.1, abs=0.15)


METHODS = {
    "prompt": fastpeft.PromptTuning(3),
    "prefix": fastpeft.PrefixTuning(4, form="hidden"),
    "lora": fastpeft.LoRA(2, targets=("q", "k")),
    "serial": fastpeft.SerialAdapter(6, locations=("attn", "cross", "ffn")),
    "parallel": fastpeft.ParallelAdapter(6),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_patched_with_caches_is_the_literal_one_without(model, memory, method):
    literal = apply_to_mplug(copy.deepcopy(model), method).double()
    patched = fastpeft.patch(copy.deepcopy(model), method, backend="reference").double()
    ours = dict(patched.named_parameters())
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in literal.named_parameters():
            if p.requires_grad:
                p.normal_(std=0.5)
                ours[name].copy_(p)
    settings = Generation(beams=3, min_length=1, max_length=7)
    found = patched.generate(memory, settings)
    for example in range(4):
        same(found[example], plain_search(Uncached(literal), part(memory, example), settings, [START]))
    assert found != model.generate(memory, settings), "the method says nothing"


@pytest.mark.parametrize("beams", [1, 4])
def test_patching_changes_no_text(model, memory, beams):
    plain = copy.deepcopy(model).float()
    stream, settings = Stream(memory.states.float(), memory.mask), Generation(beams=beams, max_length=9)
    expected = plain.generate(stream, settings)
    for got, wanted in zip(fastpeft.patch(plain).generate(stream, settings), expected, strict=True):
        assert [h.ids for h in got] == [h.ids for h in wanted]
        assert [h.score for h in got] == pytest.approx([h.score for h in wanted], rel=1e-4)
