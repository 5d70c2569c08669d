"""Text from a decoder: greedy and beam search with cached keys and values, and the ranking of given answers.

The rows of a step are examples times beams. Rows of one example lie side by side and share the keys and values of its
memory, which are computed once and move only when an example that is finished leaves the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastpeft.errors import FastPEFTError
from fastpeft.models.mplug.beams import Generation, Hypothesis, Search
from fastpeft.models.mplug.stream import DecoderCache, Stream

# Rows of the decoder that rank_answers runs at once; there are logits of the vocabulary for each of their tokens.
_ROWS = 512


@torch.no_grad()
def generate(
    model: nn.Module, memory: Stream, settings: Generation, start_ids: Tensor | None = None
) -> list[list[Hypothesis]]:
    """Search for what the decoder would say.

    Args:
        model: with `decode` and `config`, as MPlug has them, in evaluation mode.
        memory: what the decoder attends to, states (B, N, D).
        settings: of the search.
        start_ids: int64 (n,) or (B, n), tokens that the text begins with, the start token included: a prompt of p
            tokens has n = p + 1. They count in no length and no score, and hypotheses do not repeat them.

    Returns:
        Hypotheses of each example, best first.

    Raises:
        FastPEFTError: the model is being trained, start tokens do not fit, or log-probabilities are not numbers.
    """
    settings = replace(
        settings,
        start_id=model.config.cls_id if settings.start_id is None else settings.start_id,
        end_id=model.config.sep_id if settings.end_id is None else settings.end_id,
    )
    _check_tokens("end_id", settings.end_id, model.config.vocab_size)
    ids = _start(model, memory, settings.start_id, settings.max_length, start_ids)
    searches = [Search(settings) for _ in range(len(ids))]
    running, width = list(range(len(ids))), 1
    cache = DecoderCache()
    for step in range(settings.max_length if running else 0):
        logits = model.decode(ids, None, memory if step == 0 else None, cache)[:, -1]
        continuations = _best(logits, settings.beams + (step < settings.min_length), step)
        rows: list[int] = []
        tokens: list[int] = []
        places = []
        for place, example in enumerate(running):
            search = searches[example]
            search.advance(continuations[place * width : (place + 1) * width])
            if not search.done:
                places.append(place)
                for parent, token in search.last:
                    rows.append(place * width + parent)
                    tokens.append(token)
        if not places:
            break
        if rows != list(range(len(ids))):
            cache.reorder_text(torch.tensor(rows, device=ids.device))
        if len(places) < len(running):
            cache.reorder_memory(torch.tensor(places, device=ids.device))
        running, width = [running[place] for place in places], settings.beams
        ids = torch.tensor(tokens, device=ids.device)[:, None]
    return [search.hypotheses() for search in searches]


@torch.no_grad()
def rank_answers(
    model: nn.Module, memory: Stream, answers: Sequence[Sequence[int]], start_id: int | None = None, top: int = 128
) -> list[list[tuple[int, float]]]:
    """Rank given answers by their log-probability; only those whose first token is likeliest are looked at whole.

    Args:
        model: with `decode` and `config`, as MPlug has them, in evaluation mode.
        memory: what the decoder attends to, states (B, N, D).
        answers: tokens of each, without the start token and with the end token.
        start_id: token before the first; None for the model's.
        top: how many answers are looked at whole.

    Returns:
        For each example (number of the answer, log-probability), best first, `top` of them or all there are.

    Raises:
        FastPEFTError: the model is being trained, an answer or the list is empty, a token is not in the vocabulary, or
            log-probabilities are not numbers.
    """
    if type(top) is not int or top < 1:
        raise FastPEFTError(f"top must be a whole number from 1 on, got {top!r}")
    for number, answer in enumerate(answers):
        if not len(answer):
            raise FastPEFTError(f"answer {number} has no token")
    if not len(answers):
        raise FastPEFTError("there are no answers to rank")
    count = _examples_at_once(len(answers), top)
    start_id = model.config.cls_id if start_id is None else start_id
    tables = _padded(answers, memory.states.device)
    _check_tokens("an answer", tables[0], model.config.vocab_size)
    found = []
    for begin in range(0, len(memory.states), count):
        mask = None if memory.mask is None else memory.mask[begin : begin + count]
        part = Stream(memory.states[begin : begin + count], mask)
        found += _rank(model, part, *tables, start_id, top)
    return found


def ranking_calls(examples: int, answers: Sequence[Sequence[int]], top: int = 128) -> int:
    """How often `rank_answers` calls the decoder."""
    return math.ceil(examples / _examples_at_once(len(answers), top)) * (1 + any(len(answer) > 1 for answer in answers))


def _examples_at_once(answers: int, top: int) -> int:
    return max(1, _ROWS // min(top, answers))


def _rank(
    model: nn.Module, memory: Stream, ids: Tensor, lengths: Tensor, start_id: int, top: int
) -> list[list[tuple[int, float]]]:
    """The same for answers (A, M) that are filled up, of `lengths` (A,), all examples at once."""
    start = _start(model, memory, start_id, ids.shape[1], None)
    cache = DecoderCache()
    logits = model.decode(start, None, memory, cache)[:, -1]
    scores, chosen = _log_probabilities(logits)[:, ids[:, 0]].topk(min(top, len(ids)))
    if ids.shape[1] > 1:
        rows = torch.arange(len(start), device=ids.device).repeat_interleave(chosen.shape[1])
        cache.reorder_text(rows)
        texts = ids[chosen.flatten()]
        following = _log_probabilities(model.decode(texts[:, :-1], None, None, cache))
        following = following.gather(2, texts[:, 1:, None])[..., 0]
        real = torch.arange(1, ids.shape[1], device=ids.device) < lengths[chosen.flatten(), None]
        scores = scores + following.masked_fill(~real, 0).sum(1).view_as(scores)
    if scores.isnan().any():
        raise FastPEFTError("the decoder's log-probabilities are not numbers")
    scores, order = scores.sort(descending=True, stable=True)
    return [list(zip(*row, strict=True)) for row in zip(chosen.gather(1, order).tolist(), scores.tolist(), strict=True)]


def _padded(answers: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens (A, M), filled up behind the text with what nobody reads, and their number (A,)."""
    longest = max(map(len, answers))
    rows = [[*answer, *[0] * (longest - len(answer))] for answer in answers]
    return torch.tensor(rows, device=device), torch.tensor([len(answer) for answer in answers], device=device)


def _start(model: nn.Module, memory: Stream, start_id: int, generated: int, start_ids: Tensor | None) -> Tensor:
    """Start tokens (B, n), if everything fits."""
    if model.training:
        raise FastPEFTError("the model is in training mode, where dropout would be part of the text: model.eval()")
    batch, device = len(memory.states), memory.states.device
    ids = torch.tensor([start_id]) if start_ids is None else start_ids
    shape = tuple(ids.shape)
    if ids.dtype not in (torch.int64, torch.int32) or shape[:-1] not in ((), (batch,)) or not (shape and shape[-1]):
        raise FastPEFTError(f"start_ids must be whole numbers (n,) or ({batch}, n), got {ids.dtype} {shape}")
    needed = shape[-1] + generated - 1
    if needed > model.config.max_positions:
        raise FastPEFTError(
            f"{shape[-1]} start tokens and {generated} generated ones need {needed} positions, the model has "
            f"{model.config.max_positions}"
        )
    _check_tokens("start_ids", ids, model.config.vocab_size)
    return ids.to(device, torch.int64).expand(batch, -1)


def _check_tokens(what: str, tokens: Tensor | int, vocabulary: int) -> None:
    tokens = torch.as_tensor(tokens)
    strange = tokens[(tokens < 0) | (tokens >= vocabulary)]
    if strange.numel():
        raise FastPEFTError(
            f"{what} has token {strange.flatten()[0].item()}, but the model's vocabulary has {vocabulary}"
        )


def _log_probabilities(logits: Tensor) -> Tensor:
    return _exact(logits).log_softmax(-1)


def _exact(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _best(logits: Tensor, count: int, step: int) -> list[list[tuple[int, float]]]:
    """Token and log-probability of each row's best few."""
    logits = _exact(logits)
    values, tokens = logits.topk(min(count, logits.shape[-1]))
    values = (values - logits.logsumexp(-1, keepdim=True)).tolist()
    if any(math.isnan(value) for row in values for value in row):
        raise FastPEFTError(f"the decoder's log-probabilities are not numbers after {step} generated tokens")
    return [list(zip(*row, strict=True)) for row in zip(tokens.tolist(), values, strict=True)]
