"""Beam search over one example's tokens: what is kept, what is stored and when to stop. Nothing of a model is in here.

After s = 0, 1, ... earlier tokens, a beam of log-probability L(x) goes on with token t as

    L(x t) = L(x) + log p(t | x),        score(x t) = L(x t) / lp(s),        lp(s) = ((5 + s + 1) / 6)^alpha

and the best few of all beams' continuations are the next beams. The end token is no continuation while s < min_length.
A beam that ends is stored as a hypothesis. The search is over once the first beam has ended or has max_length tokens;
then all beams of that moment are stored too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest
from typing import NamedTuple

from fastpeft.errors import FastPEFTError


@dataclass(frozen=True)
class Generation:
    """How to search. Lengths are of what is generated, the end token included and start tokens not.

    Attributes:
        beams: how many; 1 is greedy.
        min_length: tokens before which there is no end token.
        max_length: tokens after which the search is over.
        alpha: of the length penalty; 0 for none.
        frozen_beams: a beam that has ended and is not the first keeps its place with its score. Otherwise it goes on
            behind its end token, as mPLUG's do, so that an end token may stand within a hypothesis.
        early_stop: the search is over when the first beam has ended, as mPLUG's is. Otherwise only when no beam can
            reach the best hypothesis's score any more.
        start_id: token before the first, unless start tokens are given; None for the model's.
        end_id: token after the last; None for the model's.
    """

    beams: int = 5
    min_length: int = 1
    max_length: int = 10
    alpha: float = 0.6
    frozen_beams: bool = False
    early_stop: bool = True
    start_id: int | None = None
    end_id: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("beams", 1), ("min_length", 0), ("max_length", 1), ("start_id", 0), ("end_id", 0)):
            value = getattr(self, name)
            if value is None and name in ("start_id", "end_id"):
                continue
            if type(value) is not int or value < least:
                raise FastPEFTError(f"{name} must be a whole number from {least} on, got {value!r}")
        if self.min_length > self.max_length:
            raise FastPEFTError(f"min_length must be at most max_length, got {self.min_length} and {self.max_length}")
        if not 0 <= self.alpha < math.inf:
            raise FastPEFTError(f"alpha must be 0 or more, got {self.alpha!r}")

    @classmethod
    def vqa(cls, **changes) -> Generation:
        """Answers: 1 to 10 tokens."""
        return cls(**{"min_length": 1, "max_length": 10, **changes})

    @classmethod
    def captions(cls, **changes) -> Generation:
        """Captions: 8 to 25 tokens."""
        return cls(**{"min_length": 8, "max_length": 25, **changes})

    def penalty(self, step: int) -> float:
        """What the log-probability of `step + 1` tokens is divided by."""
        return ((5 + step + 1) / 6) ** self.alpha


class Hypothesis(NamedTuple):
    """What was generated.

    Attributes:
        ids: generated tokens; the last is the end token, unless the search was over before.
        score: log-probability over length penalty.
    """

    ids: tuple[int, ...]
    score: float


class _Beam(NamedTuple):
    score: float
    total: float  # log-probability
    parent: int  # place among the beams of the step before
    ids: tuple[int, ...]
    stored: bool = False


class Search:
    """The search for one example.

    Args:
        settings: of the search, the end token among them.

    Attributes:
        done: it is over.
    """

    def __init__(self, settings: Generation) -> None:
        self.settings = settings
        self.done = False
        self._step = 0
        self._beams = [_Beam(0.0, 0.0, 0, ())]
        self._stored: list[Hypothesis] = []

    def advance(self, continuations: Sequence[Sequence[tuple[int, float]]]) -> None:
        """Take one more token.

        Args:
            continuations: token and log-probability of each beam's best continuations, in any order; as many as there
                are beams, or all there are. The end token may be among them where it does not count yet, and what
                comes behind the last beam is not looked at.

        Raises:
            FastPEFTError: nothing can follow.
        """
        settings, step = self.settings, self._step
        self._beams = nsmallest(settings.beams, self._candidates(continuations), key=lambda beam: -beam.score)
        if not self._beams:
            raise FastPEFTError(
                f"after {step} of at least {settings.min_length} tokens every token but the end has probability 0"
            )
        self._step += 1
        for place, beam in enumerate(self._beams):
            if self._ended(beam) and not beam.stored:
                self._store(place)
        self.done = self._step == settings.max_length or self._over()
        if self.done:
            for place, beam in enumerate(self._beams):
                if not beam.stored:
                    self._store(place)

    def _candidates(self, continuations: Sequence[Sequence[tuple[int, float]]]) -> list[_Beam]:
        settings, step = self.settings, self._step
        penalty = settings.penalty(step)
        found = []
        for place, (beam, following) in enumerate(zip(self._beams, continuations, strict=False)):
            if settings.frozen_beams and self._ended(beam):
                found.append(beam._replace(parent=place))
                continue
            for token, log_probability in following:
                if token == settings.end_id and step < settings.min_length:
                    continue
                total = beam.total + log_probability
                if total > -math.inf:
                    found.append(_Beam(total / penalty, total, place, (*beam.ids, token)))
        return found

    def _ended(self, beam: _Beam) -> bool:
        return beam.ids[-1:] == (self.settings.end_id,)

    def _store(self, place: int) -> None:
        beam = self._beams[place]
        self._stored.append(Hypothesis(beam.ids, beam.score))
        self._beams[place] = beam._replace(stored=True)

    def _over(self) -> bool:
        if self.settings.early_stop:
            return self._ended(self._beams[0])
        if not self._stored:
            return False
        # A log-probability only falls, and no length divides it by more than the last.
        open_beams = (beam for beam in self._beams if not (self.settings.frozen_beams and self._ended(beam)))
        reachable = max((beam.total for beam in open_beams), default=-math.inf)
        reachable /= self.settings.penalty(self.settings.max_length - 1)
        return max(hypothesis.score for hypothesis in self._stored) >= reachable

    @property
    def last(self) -> list[tuple[int, int]]:
        """Of each beam the place of the one that it continues and its last token, for as many beams as there may be.

        Where there are fewer, as after the first token of a small vocabulary, the first is repeated.
        """
        found = [(beam.parent, beam.ids[-1]) for beam in self._beams]
        return found + found[:1] * (self.settings.beams - len(found))

    def hypotheses(self) -> list[Hypothesis]:
        """What is stored, best first."""
        return sorted(self._stored, key=lambda hypothesis: -hypothesis.score)
