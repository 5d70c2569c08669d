"""Beam search with caches against the same search written plainly, on decoders of a few tokens."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from fastpeft.errors import FastPEFTError
from fastpeft.models.mplug.beams import Generation, Hypothesis
from fastpeft.models.mplug.generation import generate, rank_answers
from fastpeft.models.mplug.stream import DecoderCache, LayerCache, Stream

WIDTH = 6
IMPOSSIBLE = -1e15
START, END = 1, 0


class Decoder:
    """A recurrent decoder with random weights, double precision; its cache holds the tokens themselves.

    Where there is a cache, it knows the earlier tokens and the memory from that alone.
    """

    def __init__(self, seed, vocabulary=6, sharpness=3.0, end=None):
        g = torch.Generator().manual_seed(seed)
        self.words = torch.randn(vocabulary, WIDTH, generator=g, dtype=torch.double)
        self.mix = torch.randn(WIDTH, WIDTH, generator=g, dtype=torch.double)
        self.out = torch.randn(WIDTH, vocabulary, generator=g, dtype=torch.double) * sharpness
        self.bias = torch.zeros(vocabulary, dtype=torch.double)
        if end is not None:
            self.bias[0] = end
        self.calls = []
        self.config = SimpleNamespace(vocab_size=vocabulary, max_positions=20, cls_id=START, sep_id=END)
        self.training = False

    def decode(self, ids, mask, memory, cache=None):
        assert mask is None
        new = ids.shape[1]
        self.calls.append(tuple(ids.shape))
        if cache is None:
            cache = DecoderCache()
        if not cache.layers:
            cache.layers = [LayerCache()]
            cache.memory_mask = memory.mask
            cache.layers[0].memory_k = memory.states[:, None]
            cache.layers[0].memory_v = memory.states[:, None]
        layer = cache.layers[0]
        tokens = ids[:, None, :, None].double()
        tokens, _ = layer.extend(tokens, tokens)
        cache.length += new
        return self.logits(tokens[:, 0, :, 0].long(), Stream(layer.memory_k[:, 0], cache.memory_mask))[:, -new:]

    def logits(self, ids, memory):
        """All of them, of whole texts (B, M)."""
        real = torch.ones(memory.states.shape[:2]) if memory.mask is None else memory.mask
        state = (memory.states * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        state = state.repeat_interleave(len(ids) // len(state), 0)
        states = []
        for column in ids.T:
            state = torch.tanh(state @ self.mix + self.words[column])
            states.append(state)
        return torch.stack(states, 1) @ self.out + self.bias


def memory(batch, seed=0, rows=4):
    """Random states, of which the first example has all, the second one less, and so on."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.stack([torch.arange(rows) < rows - i % rows for i in range(batch)])
    return Stream(torch.randn(batch, rows, WIDTH, generator=g, dtype=torch.double), mask)


def one(stream, example):
    return Stream(stream.states[example : example + 1], stream.mask[example : example + 1])


def plain_search(decoder, stream, s, start):
    """Beam search for one example as it is written down: no cache, all beams in every step, a score for every token."""
    texts = [list(start) for _ in range(s.beams)]
    sums = torch.full((s.beams,), -math.inf, dtype=torch.double)
    sums[0] = 0
    frozen = [None] * s.beams
    stored = []
    for step in range(s.max_length):
        penalty = ((5 + step + 1) / 6) ** s.alpha
        logits = torch.stack([decoder.logits(torch.tensor([text]), stream)[0, -1] for text in texts])
        logp = logits.log_softmax(-1)
        if step < s.min_length:
            logp[:, END] = -1e20
        scores = (sums[:, None] + logp) / penalty
        for i, score in enumerate(frozen):
            if score is not None:
                scores[i] = -math.inf
                scores[i, END] = score
        best, places = scores.flatten().topk(s.beams)
        parents, tokens = places // logits.shape[1], places % logits.shape[1]
        previous, texts = texts, []
        was_frozen, frozen = frozen, []
        for parent, token, score in zip(parents.tolist(), tokens.tolist(), best.tolist(), strict=True):
            kept = was_frozen[parent] is not None
            texts.append(previous[parent] + ([] if kept else [token]))
            ended = token == END
            frozen.append(score if ended and s.frozen_beams else None)
            if ended and not kept:
                stored.append((texts[-1], score))
        sums = best * penalty
        if tokens[0] == END or step + 1 == s.max_length:
            stored += [(t, v) for t, v, n in zip(texts, best.tolist(), tokens, strict=True) if n != END]
            break
    found = [(tuple(text[len(start) :]), score) for text, score in stored if score > IMPOSSIBLE]
    return sorted(found, key=lambda pair: -pair[1])


def same(got, expected):
    assert [h.ids for h in got] == [tuple(ids) for ids, _ in expected]
    assert [h.score for h in got] == pytest.approx([score for _, score in expected], rel=1e-9)


SEARCHES = [
    Generation(beams=beams, min_length=low, max_length=high, frozen_beams=frozen, alpha=alpha)
    for beams, low, high, frozen, alpha in [
        (1, 1, 6, False, 0.6),
        (2, 0, 6, False, 0.6),
        (2, 0, 6, True, 0.6),
        (3, 1, 1, False, 0.6),
        (3, 2, 7, False, 0.6),
        (3, 2, 7, True, 0.6),
        (5, 1, 10, False, 0.6),
        (5, 1, 10, True, 0.6),
        (5, 3, 8, False, 0.0),
        (9, 0, 5, False, 1.3),
        (9, 0, 5, True, 1.3),
    ]
]


@pytest.mark.parametrize("settings", SEARCHES, ids=str)
def test_search_is_the_plain_search(settings):
    inner = lengths = 0
    for seed in range(6):
        decoder, stream = Decoder(seed, vocabulary=5 + seed % 4), memory(3, seed)
        for example, got in enumerate(generate(decoder, stream, settings)):
            same(got, plain_search(decoder, one(stream, example), settings, [1]))
            inner += any(0 in h.ids[:-1] for h in got)
            lengths += len({len(h.ids) for h in got}) > 1
    if settings.frozen_beams or settings.beams == 1:
        assert inner == 0
    elif settings.max_length - settings.min_length > 2:
        assert inner > 0, "no beam went on behind its end: the switch is not tested"
    assert lengths > 0 or settings.beams == 1 or settings.max_length == 1


def test_the_switch_matters():
    settings = Generation(beams=3, min_length=0, max_length=8)
    frozen = Generation(beams=3, min_length=0, max_length=8, frozen_beams=True)
    assert any(
        generate(Decoder(seed), memory(1), settings)[0][0] != generate(Decoder(seed), memory(1), frozen)[0][0]
        for seed in range(20)
    )


def constant(probabilities):
    """A decoder that says the same whatever comes before."""
    decoder = Decoder(0, vocabulary=len(probabilities))
    decoder.out.zero_()
    decoder.bias = torch.tensor(probabilities, dtype=torch.double).log()
    return decoder


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("low", [0, 1, 4])
def test_the_end_comes_behind_min_length_tokens(beams, low):
    settings = Generation(beams=beams, min_length=low, max_length=9)
    best = generate(constant([0.9, 0.07, 0.03]), memory(1), settings)[0][0]
    assert best.ids == (1,) * low + (0,)
    total = math.log(0.9) + low * math.log(0.07)
    assert best.score == pytest.approx(total / ((5 + low + 1) / 6) ** 0.6)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("high", [1, 2, 7])
def test_there_are_max_length_tokens_and_no_more(beams, high):
    decoder = constant([1e-9, 0.8, 0.2])
    settings = Generation(beams=beams, min_length=0, max_length=high)
    found = generate(decoder, memory(1), settings)[0]
    assert {len(h.ids) for h in found if h.ids[-1] != 0} == {high}
    assert found[0].ids == (1,) * high
    assert found[0].score == pytest.approx(high * math.log(0.8) / ((5 + high) / 6) ** 0.6)
    assert len(decoder.calls) == high


def test_length_penalty_decides():
    # One token, log .3; or four, 4 log .7: -1.204 and -1.427, but -1.204 and -1.119 with penalty.
    for alpha, expected in ((0.0, (0,)), (0.6, (1, 1, 1, 1))):
        settings = Generation(beams=16, min_length=0, max_length=4, alpha=alpha, early_stop=False)
        assert generate(constant([0.3, 0.7]), memory(1), settings)[0][0].ids == expected


def sentences(vocabulary, s):
    """All that may be generated."""
    for length in range(1, s.max_length + 1):
        for ids in itertools.product(range(vocabulary), repeat=length):
            long_enough = length > s.min_length if ids[-1] == 0 else length == s.max_length
            if long_enough and 0 not in ids[:-1]:
                yield ids


def score(decoder, ids, s, stream=None):
    stream = memory(1) if stream is None else stream
    logp = decoder.logits(torch.tensor([[1, *ids[:-1]]]), stream)[0].log_softmax(-1)
    total = logp[torch.arange(len(ids)), torch.tensor(ids)].sum().item()
    return total / ((5 + len(ids)) / 6) ** s.alpha


@pytest.mark.parametrize("low", [0, 2])
@pytest.mark.parametrize("alpha, early", [(0.0, True), (0.0, False), (0.6, False), (2.0, False)])
def test_enough_beams_find_the_best_of_all_sentences(alpha, early, low):
    settings = Generation(
        beams=128,
        min_length=low,
        max_length=4,
        alpha=alpha,
        frozen_beams=True,
        early_stop=early,
    )
    for seed in range(4):
        decoder, stream = Decoder(seed, vocabulary=4, sharpness=1.0), memory(1, seed)
        every = {ids: score(decoder, ids, settings, stream) for ids in sentences(4, settings)}
        best = generate(decoder, stream, settings)[0][0]
        assert best.ids == max(every, key=every.get)
        assert best.score == pytest.approx(max(every.values()))


def test_without_early_stop_longer_ones_may_win():
    found = set()
    for seed in range(30):
        decoder, stream = Decoder(seed, sharpness=1.5), memory(1, seed)
        both = [
            generate(decoder, stream, Generation(beams=4, max_length=8, early_stop=early))[0][0]
            for early in (True, False)
        ]
        assert both[1].score >= both[0].score
        found.add(both[0] == both[1])
    assert found == {True, False}


class Stubborn(Decoder):
    """Says the end or token 1 at first, and then token 1 for ever, nearly surely."""

    def logits(self, ids, memory):
        first, later = (torch.tensor(p, dtype=torch.double).log() for p in ([0.5, 0.4, 0.1], [1e-9, 1.0, 1e-9]))
        return torch.stack([first, *[later] * (ids.shape[1] - 1)]).expand(len(ids), -1, -1)


def test_without_early_stop_all_remaining_tokens_count():
    # The end is ahead with log .5 = -.69 until log .4 = -.92 is divided by more than 4/3: far behind the next token.
    for early, ids, value in ((True, (0,), math.log(0.5)), (False, (1,) * 10, math.log(0.4) / 2.5)):
        settings = Generation(beams=2, min_length=0, max_length=10, alpha=1.0, frozen_beams=True, early_stop=early)
        best = generate(Stubborn(0, vocabulary=3), memory(1), settings)[0][0]
        assert (best.ids, best.score) == (ids, pytest.approx(value, abs=1e-6))


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("frozen", [False, True])
def test_neither_order_nor_company_nor_padding_changes_a_result(beams, frozen):
    settings = Generation(beams=beams, min_length=1, max_length=9, frozen_beams=frozen)
    decoder, stream = Decoder(3), memory(9)
    together = generate(decoder, stream, settings)
    assert len({len(found[0].ids) for found in together}) > 1, "all end at once"
    order = torch.randperm(9)
    shuffled = generate(decoder, Stream(stream.states[order], stream.mask[order]), settings)
    longer = Stream(
        torch.cat((stream.states, torch.full((9, 3, WIDTH), 50.0)), 1),
        torch.cat((stream.mask, torch.zeros(9, 3, dtype=torch.bool)), 1),
    )
    padded = generate(decoder, longer, settings)
    for example in range(9):
        expected = [(h.ids, h.score) for h in generate(decoder, one(stream, example), settings)[0]]
        for found in (together[example], shuffled[order.tolist().index(example)], padded[example]):
            same(found, expected)


def test_finished_examples_leave_the_batch():
    decoder = Decoder(3)
    settings = Generation(beams=4, max_length=9)
    found = generate(decoder, memory(9), settings)
    rows = [rows for rows, _ in decoder.calls]
    assert rows[0] == 9, "one row an example before the first token"
    assert all(tokens == 1 for _, tokens in decoder.calls), "only new tokens"
    assert rows[1:] == sorted(rows[1:], reverse=True) and rows[-1] < rows[1] <= 36
    assert all(count % 4 == 0 for count in rows[1:])
    assert len(found) == 9


@pytest.mark.parametrize("beams", [1, 4])
def test_the_cache_moves_only_where_it_must(beams, monkeypatch):
    moves = []
    for name in ("reorder_text", "reorder_memory"):
        move = getattr(DecoderCache, name)
        monkeypatch.setattr(
            DecoderCache, name, lambda self, index, name=name, move=move: (moves.append(name), move(self, index))
        )
    never = Decoder(3, end=-1e9)
    generate(never, memory(3), Generation(beams=beams, max_length=6))
    assert "reorder_memory" not in moves
    assert bool(moves) == (beams > 1), "greedy search reorders nothing"


def test_start_tokens():
    settings = Generation(beams=3, max_length=6)
    decoder, stream = Decoder(5), memory(4)
    for start in ([1], [1, 4, 2], [1, 0, 3]):
        got = generate(decoder, stream, settings, torch.tensor(start))
        for example in range(4):
            same(got[example], plain_search(decoder, one(stream, example), settings, start))
    starts = torch.tensor([[1, 2], [1, 3], [1, 4], [1, 5]])
    got = generate(decoder, stream, settings, starts)
    for example in range(4):
        same(got[example], plain_search(decoder, one(stream, example), settings, starts[example].tolist()))
    assert got[0] != generate(decoder, stream, settings)[0]


def test_an_empty_batch():
    assert generate(Decoder(0), memory(1)._replace(states=torch.zeros(0, 4, WIDTH)), SEARCHES[0]) == []


ANSWERS = [(2, 0), (2, 3, 0), (4, 0), (3, 3, 3, 0), (0,), (5, 1, 0), (2, 2, 0)]


@pytest.mark.parametrize("top", [1, 3, 128])
def test_ranking(top, monkeypatch):
    monkeypatch.setattr("fastpeft.models.mplug.generation._ROWS", 7)
    decoder, stream = Decoder(2, sharpness=1.0), memory(5)
    for example, got in enumerate(rank_answers(decoder, stream, ANSWERS, top=top)):
        no_penalty = Generation(alpha=0.0)
        alone = one(stream, example)
        first = [score(decoder, ids[:1], no_penalty, alone) for ids in ANSWERS]
        likeliest = sorted(range(len(ANSWERS)), key=lambda i: -first[i])[:top]
        # Answers with the same first token are equally likely at first; which of them are taken is not said.
        least = min(first[i] for i in likeliest)
        assert all(first[number] >= least - 1e-12 for number, _ in got)
        assert len(got) == min(top, len(ANSWERS)) == len({number for number, _ in got})
        for number, value in got:
            assert value == pytest.approx(score(decoder, ANSWERS[number], no_penalty, alone))
        assert [value for _, value in got] == sorted((value for _, value in got), reverse=True)


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"beams": 0}, "beams must be a whole number from 1 on, got 0"),
        ({"beams": 2.0}, "beams must be a whole number from 1 on, got 2.0"),
        ({"min_length": -1}, "min_length must be a whole number from 0 on, got -1"),
        ({"max_length": 0}, "max_length must be a whole number from 1 on, got 0"),
        ({"min_length": 11}, "min_length must be at most max_length, got 11 and 10"),
        ({"alpha": -0.1}, "alpha must be 0 or more, got -0.1"),
        ({"alpha": math.nan}, "alpha must be 0 or more, got nan"),
        ({"end_id": -2}, "end_id must be a whole number from 0 on, got -2"),
    ],
)
def test_settings_that_cannot_be(changes, line):
    with pytest.raises(FastPEFTError) as error:
        Generation(**changes)
    assert str(error.value) == line


def test_presets():
    vqa, captions = Generation.vqa(), Generation.captions(beams=1)
    assert (vqa.beams, vqa.min_length, vqa.max_length, vqa.alpha) == (5, 1, 10, 0.6)
    assert (captions.beams, captions.min_length, captions.max_length) == (1, 8, 25)
    assert (vqa.frozen_beams, vqa.early_stop) == (False, True)
    # lp(0) = 1, and the exponent is the published one.
    assert vqa.penalty(0) == 1 and vqa.penalty(6) == pytest.approx(2**0.6)


def fails(line, call):
    with pytest.raises(FastPEFTError) as error:
        call()
    assert line in str(error.value) and "\n" not in str(error.value)


def test_what_cannot_be_generated():
    stream, settings = memory(2), Generation(beams=2)
    decoder = Decoder(0)
    fails(
        "start_ids must be whole numbers (n,) or (2, n)",
        lambda: generate(decoder, stream, settings, torch.ones(3, 1).long()),
    )
    fails("start_ids must be", lambda: generate(decoder, stream, settings, torch.ones(2, 0).long()))
    fails("start_ids must be", lambda: generate(decoder, stream, settings, torch.tensor(1)))
    fails("start_ids must be", lambda: generate(decoder, stream, settings, torch.ones(2, 1)))
    fails(
        "end_id has token 102, but the model's vocabulary has 6",
        lambda: generate(decoder, stream, Generation(end_id=102)),
    )
    fails(
        "after 0 of at least 1 tokens every token but the end has probability 0",
        lambda: generate(constant([1.0, 0.0, 0.0]), stream, settings),
    )
    broken = Decoder(0)
    broken.bias[2] = math.nan
    fails("not numbers after 0 generated tokens", lambda: generate(broken, stream, settings))
    fails("not numbers", lambda: rank_answers(broken, stream, ANSWERS))
    decoder.config.max_positions = 10
    generate(decoder, stream, settings, torch.tensor([1]))
    fails(
        "2 start tokens and 10 generated ones need 11 positions, the model has 10",
        lambda: generate(decoder, stream, settings, torch.tensor([1, 2])),
    )
    fails("start_ids has token 6, but", lambda: generate(decoder, stream, settings, torch.tensor([6])))
    fails("start_ids has token -1, but", lambda: generate(decoder, stream, settings, torch.tensor([-1])))
    decoder.training = True
    fails("model.eval()", lambda: generate(decoder, stream, settings))
    fails("model.eval()", lambda: rank_answers(decoder, stream, ANSWERS))
    decoder.training = False
    fails("there are no answers", lambda: rank_answers(decoder, stream, []))
    fails("answer 1 has no token", lambda: rank_answers(decoder, stream, [(2, 0), ()]))
    fails("top must be a whole number from 1 on", lambda: rank_answers(decoder, stream, ANSWERS, top=0))
    fails("an answer has token 9, but", lambda: rank_answers(decoder, stream, [(9, 0)]))
    fails("an answer has token -1, but", lambda: rank_answers(decoder, stream, [(-1, 0)]))


def test_half_precision_logits_are_added_up_in_single():
    decoder, stream = Decoder(1), memory(2)
    decode = decoder.decode
    expected = generate(decoder, stream, SEARCHES[4])
    decoder.decode = lambda *arguments: decode(*arguments).bfloat16().float()
    rounded = generate(decoder, stream, SEARCHES[4])
    decoder.decode = lambda *arguments: decode(*arguments).bfloat16()
    assert generate(decoder, stream, SEARCHES[4]) == rounded
    assert rounded[0][0].score == pytest.approx(expected[0][0].score, rel=0.05)
    assert isinstance(rounded[0][0], Hypothesis)
