"""Which runs a figure of the study rests on, and having them done."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.mplug_study.corpora import Corpus
from bench.mplug_study.job import FINAL, SEARCH, Base, MPlugJob
from bench.mplug_study.methods import Tuning
from bench.mplug_study.protocol import Protocol
from bench.tables.results import Results

SEARCH_SEED = 0


@dataclass(frozen=True)
class Sweep:
    """What is varied.

    Attributes:
        ratios: shares of the data; None for the protocol's.
        sizes: of the modules; None for the protocol's of each method.
        classifier: without the output layer, with it, or both.
        product: every share with every size, instead of all shares at the reference size and all sizes with all data.
    """

    ratios: tuple[float, ...] | None = None
    sizes: tuple[int, ...] | None = None
    classifier: tuple[bool, ...] = (False, True)
    product: bool = False


@dataclass(frozen=True)
class Experiment:
    """The runs of a method on one corpus.

    Attributes:
        base: the pretrained model.
        corpus: captions or questions.
        protocol: how they are trained.
        tuning: the method.
        sweep: what is varied.
    """

    base: Base
    corpus: Corpus
    protocol: Protocol
    tuning: Tuning
    sweep: Sweep

    @property
    def rates(self) -> tuple[float, ...]:
        """Peak learning rates to choose from."""
        return self.protocol.schedules[self.corpus.kind].rates[self.tuning.name]

    @property
    def cells(self) -> list[tuple[int, float, bool]]:
        """Size, share and classifier of every final run, each once."""
        schedule, tuning, sweep = self.protocol.schedules[self.corpus.kind], self.tuning, self.sweep
        ratios = schedule.ratios if sweep.ratios is None else sweep.ratios
        if not tuning.knob:
            # Full fine-tuning trains the output layer anyway.
            return [(0, ratio, False) for ratio in ratios]
        sizes = schedule.sizes[tuning.name] if sweep.sizes is None else sweep.sizes
        reference = tuning.reference if tuning.reference in sizes else sizes[len(sizes) // 2]
        pairs = list(itertools.product(sizes, ratios))
        if not sweep.product:
            pairs = [(size, ratio) for size, ratio in pairs if size == reference or ratio == max(ratios)]
        return [(*pair, classifier) for classifier in sweep.classifier for pair in pairs]

    @property
    def size(self) -> int:
        """Number of runs."""
        return len(self.cells) * len(self.protocol.seeds) + (len(self.rates) if len(self.rates) > 1 else 0)

    def batches(self, results: Results) -> Iterator[list[MPlugJob]]:
        """The search, if there is something to choose; then, when it is in the results, the final runs."""
        searched = self.search()
        rate = self.rates[0]
        if searched:
            yield searched
            # Of equals the smaller rate.
            rate = max(searched, key=lambda job: (results.score(results.find(**job.key())), -job.rate)).rate
        yield [
            self._job(size, ratio, classifier, FINAL, seed, rate)
            for size, ratio, classifier in self.cells
            for seed in self.protocol.seeds
        ]

    def search(self) -> list[MPlugJob]:
        """The runs that the rate is chosen by: all of the data, the reference size."""
        if len(self.rates) < 2:
            return []
        return [self._job(self.tuning.reference, 1.0, False, SEARCH, SEARCH_SEED, rate) for rate in self.rates]

    def _job(self, size: int, ratio: float, classifier: bool, stage: str, seed: int, rate: float) -> MPlugJob:
        return MPlugJob(self.base, self.corpus, self.protocol, self.tuning, size, ratio, classifier, stage, seed, rate)


def experiments(
    base: Base, corpora: Sequence[Corpus], protocol: Protocol, methods: Sequence[str], sweep: Sweep
) -> list[Experiment]:
    """Of all methods on all corpora."""
    return [Experiment(base, corpus, protocol, protocol.tunings[name], sweep) for corpus in corpora for name in methods]
