"""Losses: which tokens are targets, and how they are summed."""

from __future__ import annotations

import pytest
import torch

from fastpeft import FastPEFTError
from fastpeft.models.mplug import Stream
from tests.models.mplug import written
from tests.models.mplug.tiny import TINY, make

CLS, SEP, PAD = TINY.cls_id, TINY.sep_id, TINY.pad_id
TEXT = torch.tensor([[CLS, 9, 8, SEP, PAD, PAD], [CLS, 7, SEP, PAD, PAD, PAD], [CLS, 5, 6, 4, 3, SEP]])
TARGETS = [[9, 8, SEP], [7, SEP], [5, 6, 4, 3, SEP]]


def prepared():
    model = make().double()
    generator = torch.Generator().manual_seed(3)
    memory = Stream(torch.randn(3, 5, 32, generator=generator, dtype=torch.float64))
    return model, memory


def by_hand(model, ids, memory) -> list[list[float]]:
    """From the decoder written out, with the padding masked."""
    logits = written.decoder(
        model.state_dict(), ids, ids != PAD, memory.states, torch.ones(memory.states.shape[:2]), layers=2, heads=4
    )
    return written.next_token_losses(logits, ids, PAD)


@torch.no_grad()
def test_every_token_after_the_first_is_a_target_and_padding_is_none():
    model, memory = prepared()
    found, real = model.token_losses(TEXT, memory)
    assert found.shape == real.shape == (3, 5)
    assert [row[keep].tolist() for row, keep in zip(TEXT[:, 1:], real, strict=True)] == TARGETS
    for losses, keep, expected in zip(found, real, by_hand(model, TEXT, memory), strict=True):
        torch.testing.assert_close(losses[keep], torch.stack(expected), rtol=1e-10, atol=1e-11)
        assert not losses[~keep].any()


@torch.no_grad()
def test_caption_loss_is_the_mean_over_all_tokens():
    model, memory = prepared()
    expected = [x for row in by_hand(model, TEXT, memory) for x in row]
    assert len(expected) == 10
    found = model.caption_loss(TEXT, memory)
    assert found.dim() == 0
    assert float(found) == pytest.approx(float(sum(expected)) / 10, rel=1e-10)


@torch.no_grad()
def test_caption_loss_of_a_mask():
    # Of a text in which the padding's id stands for something.
    model, memory = prepared()
    mask = TEXT != PAD
    assert float(model.caption_loss(TEXT, memory, mask)) == pytest.approx(float(model.caption_loss(TEXT, memory)))
    mask[2, 5] = False
    rows = by_hand(model, TEXT, memory)
    expected = [*rows[0], *rows[1], *rows[2][:-1]]
    assert float(model.caption_loss(TEXT, memory, mask)) == pytest.approx(float(sum(expected)) / 9, rel=1e-5)


@torch.no_grad()
def test_vqa_loss_is_the_weighted_sum_over_the_number_of_questions():
    model, memory = prepared()
    # Two questions: the first with two answers, the second with one; sums of tokens, not means.
    memory = Stream(memory.states[:2])
    weights, counts = torch.tensor([0.7, 0.3, 1.0]), torch.tensor([2, 1])
    rows = by_hand(model, TEXT, Stream(memory.states[[0, 0, 1]]))
    expected = sum(float(w) * float(sum(row)) for w, row in zip(weights, rows, strict=True)) / 2
    found = model.vqa_loss(TEXT, weights, counts, memory)
    assert float(found) == pytest.approx(expected, rel=1e-7)


@torch.no_grad()
def test_vqa_loss_repeats_the_memory_with_its_mask():
    model, memory = prepared()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 2:] = False
    weights, counts = torch.tensor([0.7, 0.3, 1.0]), torch.tensor([2, 1])
    found = model.vqa_loss(TEXT, weights, counts, Stream(memory.states[:2], mask))
    first = model.token_losses(TEXT[:2], Stream(memory.states[[0, 0], :2]))[0].sum(1)
    second = model.token_losses(TEXT[2:], Stream(memory.states[1:2]))[0].sum(1)
    expected = (0.7 * first[0] + 0.3 * first[1] + second[0]) / 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_answers_that_are_not_as_many_as_counted():
    model, memory = prepared()
    with pytest.raises(FastPEFTError, match="3 answers are given, but the counts of the 3 questions sum up to 4"):
        model.vqa_loss(TEXT, torch.ones(3), torch.tensor([2, 1, 1]), memory)
    with pytest.raises(FastPEFTError, match="2 counts of answers for a memory of 3 questions"):
        model.vqa_loss(TEXT, torch.ones(3), torch.tensor([2, 1]), memory)
    with pytest.raises(FastPEFTError, match="3 answers need as many weights, got 2"):
        model.vqa_loss(TEXT, torch.ones(2), torch.tensor([1, 1, 1]), memory)


@torch.no_grad()
@pytest.mark.parametrize("dtype, expected", [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)])
def test_losses_are_at_least_fp32(dtype, expected):
    model, memory = prepared()
    exact = model.caption_loss(TEXT, memory)
    assert exact.dtype == torch.float64
    found = model.to(dtype).caption_loss(TEXT, Stream(memory.states.to(dtype)))
    assert found.dtype == expected
    assert float(found) == pytest.approx(float(exact), rel=0.02)


@torch.no_grad()
def test_a_batch_without_targets_has_no_loss():
    model, memory = prepared()
    ids = torch.tensor([[CLS, PAD], [CLS, PAD], [CLS, PAD]])
    assert float(model.caption_loss(ids, memory)) == 0.0
    assert float(model.vqa_loss(ids, torch.ones(3), torch.tensor([1, 1, 1]), memory)) == 0.0


def test_gradients_of_the_tied_matrix_are_both_parts():
    model, memory = prepared()
    table = model.text_decoder.bert.embeddings.word_embeddings.weight
    model.caption_loss(TEXT, memory).backward()
    found = table.grad.clone()
    unused = [i for i in range(61) if i not in TEXT]
    # As a vocabulary matrix it moves everywhere, as an embedding only where there are tokens.
    assert (found[unused].norm(dim=1) > 0).all()
    state = {name: t.detach().clone() for name, t in model.state_dict().items()}
    leaf = state["text_decoder.bert.embeddings.word_embeddings.weight"].requires_grad_()
    logits = written.decoder(state, TEXT, TEXT != PAD, memory.states, torch.ones(3, 5), layers=2, heads=4)
    losses = [x for row in written.next_token_losses(logits, TEXT, PAD) for x in row]
    (sum(losses) / len(losses)).backward()
    torch.testing.assert_close(found, leaf.grad, rtol=1e-5, atol=1e-7)
