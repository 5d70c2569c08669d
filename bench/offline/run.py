"""One run of the study."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

from bench.tables.job import Job
from fastpeft.config import Config
from fastpeft.trainer.feature_store import FeatureStore


@dataclass(frozen=True)
class ShortJob(Job):
    """A run of few epochs, whose head starts small.

    The protocol's head starts with logits of several units at random, which a hundred epochs forget and ten do not.
    Checkpoints are for runs of hours; one half-way is enough for runs of minutes.
    """

    def config(self, out: Path, *more: object) -> Config:
        """What the trainer is told; `more` is what a job's own configuration takes besides."""
        usual = super().config(out, *more)
        half = max(1, self.protocol.epochs // 2)
        changed = {"head_init": "keep", "checkpoint_every": f"{half} epochs"}
        return usual.model_copy(update={"train": usual.train.model_copy(update=changed)})

    def run(self, runs: Path, features: FeatureStore | None = None) -> dict[str, object]:
        """Train; what its model and images took is free when this returns."""
        try:
            return super().run(runs, features)
        finally:
            gc.collect()
