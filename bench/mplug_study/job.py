"""One run of the study: a method of a size on a share of the data, trained by the library's own trainer."""

from __future__ import annotations

import datetime
import gc
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastpeft
from bench.mplug_study import curves
from bench.mplug_study.corpora import Corpus
from bench.mplug_study.methods import Tuning
from bench.mplug_study.protocol import Protocol, Schedule
from bench.tables.results import Schema
from fastpeft.config_mplug import KINDS, MPlugRun
from fastpeft.trainer import launch, session
from fastpeft.trainer.feature_store import FeatureStore
from fastpeft.trainer.loop import DivergedError
from fastpeft.trainer.report import Reporter

SEARCH, FINAL = "search", "final"
SCHEMA = Schema(
    key=(
        "task", "method", "size", "ratio", "classifier", "stage", "seed", "backbone", "image_size", "protocol", "rate",
    ),
    values=(
        "metric", "score", "scores", "selected", "train_size", "trained_parameters", "backbone_parameters", "seconds",
        "ms_per_image", "peak_memory_mb", "precision", "device", "version", "date",
    ),
    score="score",
)  # fmt: skip


@dataclass(frozen=True)
class Base:
    """The pretrained model.

    Attributes:
        name: in results.
        fields: of a configuration's section `model`.
    """

    name: str
    fields: Mapping[str, Any]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class MPlugJob:
    """A run.

    Attributes:
        size: length, rank or hidden units of the method's module.
        ratio: share of the training samples.
        classifier: whether the output layer is trained too.
        stage: `SEARCH` is scored on validation, `FINAL` on test, in the state that was best on validation.
        rate: peak learning rate.
    """

    base: Base
    corpus: Corpus
    protocol: Protocol
    tuning: Tuning
    size: int
    ratio: float
    classifier: bool
    stage: str
    seed: int
    rate: float

    alone = True
    read_again = ("train", "val", "test")

    @property
    def schedule(self) -> Schedule:
        """Of captions or questions."""
        return self.protocol.schedules[self.corpus.kind]

    def key(self) -> dict[str, object]:
        """What its row in the results is found by."""
        return {
            "task": self.corpus.name,
            "method": self.tuning.name,
            "size": self.size,
            "ratio": f"{self.ratio:g}",
            "classifier": "yes" if self.classifier else "no",
            "stage": self.stage,
            "seed": self.seed,
            "backbone": self.base.name,
            "image_size": self.base.fields.get("image_size", ""),
            "protocol": self.protocol.named(self.corpus.kind),
            "rate": f"{self.rate:g}",
        }

    def config(self, out: Path) -> MPlugRun:
        """What the trainer is told."""
        data = {**self.schedule.data, **self.corpus.fields, "data_ratio": self.ratio}
        if self.stage == SEARCH:
            del data["test"]
        return KINDS[data["name"]].model_validate(
            {
                "model": dict(self.base.fields),
                "data": data,
                "method": self.tuning.method(self.size, self.classifier),
                "train": {**self.schedule.train, "base_lr": self.rate, "seed": self.seed},
                "eval": dict(self.schedule.evaluation),
                "out": str(out),
            }
        )

    def out(self, runs: Path) -> Path:
        """The run's own folder."""
        digest = hashlib.sha256(json.dumps(self.key(), sort_keys=True).encode()).hexdigest()[:12]
        return runs / f"{self.corpus.name}-{self.tuning.name}-{self.stage}-{digest}"

    def run(self, runs: Path, features: FeatureStore | None = None) -> dict[str, object]:
        """Train, or go on training where a run was interrupted; the row for the results.

        A run whose loss is not finite has a score of zero, so that the study goes on without it.

        Raises:
            ConfigError: the run cannot begin.
        """
        try:
            outcome = session.run(
                self.config(self.out(runs)), str(self), False, Reporter(False), launch.find_ranks(), features
            )
        except DivergedError:
            return self.key() | self._diverged()
        finally:
            gc.collect()
        if self.stage == FINAL:
            path = runs.parent / curves.FOLDER / f"{self.out(runs).name}.csv"
            curves.keep(path, self.key(), outcome["history"], f"val_{self.schedule.metric}")
        return self.key() | self._values(outcome)

    def clear(self, runs: Path) -> None:
        """Remove the run's folder, when its row is kept."""
        shutil.rmtree(self.out(runs), ignore_errors=True)

    def _diverged(self) -> dict[str, object]:
        about = {"version": fastpeft.__version__, "date": datetime.date.today().isoformat(), "score": "0"}
        about |= {"metric": self.schedule.metric, "device": launch.find_ranks().device.type}
        return dict.fromkeys(SCHEMA.values, "") | about

    def _values(self, outcome: dict[str, Any]) -> dict[str, object]:
        metric = self.schedule.metric
        if self.stage == SEARCH:
            scores = {metric: max(entry[f"val_{metric}"] for entry in outcome["history"] if f"val_{metric}" in entry)}
        else:
            scores = outcome["test_scores"]
        return {
            "metric": metric,
            "score": f"{scores[metric]:.6f}",
            "scores": ";".join(f"{name}={value:.6f}" for name, value in sorted(scores.items())),
            "selected": outcome["selected_epoch"],
            "train_size": outcome["train_size"],
            "trained_parameters": outcome["trained_parameters"],
            "backbone_parameters": outcome["backbone_parameters"],
            "seconds": f"{outcome['seconds']['total']:.2f}",
            "ms_per_image": f"{outcome['ms_per_image']:.4f}",
            "peak_memory_mb": f"{max(outcome['peak_memory_mb'].values()):.0f}",
            "precision": str(outcome["precision"]).split()[0].rstrip(","),
            "device": outcome["device"],
            "version": fastpeft.__version__,
            "date": datetime.date.today().isoformat(),
        }

    def __str__(self) -> str:
        size = f" {self.tuning.knob} {self.size}" if self.tuning.knob else ""
        classifier = " and classifier" if self.classifier else ""
        return (
            f"{self.corpus.name} {self.tuning.name}{size}{classifier}, {100 * self.ratio:g}% of the data, "
            f"{self.stage}, rate {self.rate:g}, seed {self.seed}"
        )
