"""One run: a row's method with one setting on one task, trained by the library's own trainer."""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastpeft
from bench.tables import curves
from bench.tables import protocol as protocols
from bench.tables.protocol import Point, Protocol, Row
from bench.tables.results import point_text
from bench.tables.tasks import data_fields
from bench.tables.training_set import DEFAULT, TrainingSet
from fastpeft.config import Config
from fastpeft.trainer import launch, session
from fastpeft.trainer.feature_store import FeatureStore
from fastpeft.trainer.loop import DivergedError
from fastpeft.trainer.report import Reporter

# Folder, beside the runs' own, of those that others begin with.
TUNED = "tuned"


@dataclass(frozen=True)
class Backbone:
    """A pretrained model.

    Attributes:
        name: timm name.
        weights: as of a configuration's `model.weights`, or None.
        image_size: side of the square input in pixels.
        model: more fields of a configuration's `model`.
    """

    name: str
    weights: str | None
    image_size: int
    model: tuple[tuple[str, object], ...] = ()

    @classmethod
    def parse(cls, text: str, image_size: int, model: tuple[tuple[str, object], ...] = ()) -> Backbone:
        """Of NAME or NAME@WEIGHTS."""
        name, _, weights = text.partition("@")
        return cls(name, weights or None, image_size, model)

    def __str__(self) -> str:
        fields = "".join(f" {key}={value}" for key, value in self.model)
        return (self.name if self.weights is None else f"{self.name}@{self.weights}") + fields


@dataclass(frozen=True)
class Job:
    """A run.

    Attributes:
        task: as in the papers.
        folder: of the task under the data's root.
        root: of the data.
        stage: "search" trains on train800 and is scored on val200; "final" trains on both and is tested; "curve" is a
            final run that is tested after every epoch.
        resize: as of a configuration's `data.resize`.
        images: that it trains on.
        start: the run that trained what this one begins with, backbone and head.
        keep: leave its result behind for runs that need it.
    """

    backbone: Backbone
    root: Path
    task: str
    folder: str
    row: Row
    protocol: Protocol
    stage: str
    point: tuple[tuple[str, float], ...]
    seed: int
    resize: str = "squash"
    images: TrainingSet = DEFAULT
    start: Job | None = None
    keep: bool = False

    @property
    def setting(self) -> Point:
        """What was searched."""
        return dict(self.point)

    def key(self) -> dict[str, object]:
        """What its row in the results is found by."""
        return {
            "task": self.task,
            "method": self.row.name,
            "stage": self.stage,
            "seed": self.seed,
            "backbone": str(self.backbone),
            "image_size": self.backbone.image_size,
            "protocol": self.protocol.name,
            "setting": self.images.name,
            "point": point_text(self.setting),
        }

    def config(self, out: Path, start: Path | None = None) -> Config:
        """What the trainer is told.

        Args:
            out: folder of the run.
            start: adapter of the run that this one begins with.
        """
        point = self.setting
        model: dict[str, Any] = {"name": self.backbone.name, "image_size": self.backbone.image_size}
        if self.backbone.weights is not None:
            model["weights"] = self.backbone.weights
        model |= dict(self.backbone.model) | dict(self.row.model)
        if start is not None:
            model["start"] = str(start)
        # The search looks at the validation images alone: one test image is the least that the trainer takes.
        test = {"test_size": 1} if self.stage == "search" else {}
        return Config.model_validate(
            {
                "model": model,
                "data": {
                    **data_fields(self.root, self.folder, self.stage, self.resize),
                    **self.images.fields(self.root / self.folder),
                    **test,
                },
                "method": protocols.method(self.row, point),
                "train": {
                    "epochs": self.protocol.epochs,
                    "warmup_epochs": self.protocol.warmup_epochs,
                    "batch_size": protocols.batch_size(self.row, point),
                    "optimizer": self.row.optimizer,
                    "base_lr": point["base_lr"],
                    "weight_decay": point["weight_decay"],
                    "seed": self.seed,
                    "eval_every": 1 if self.stage == "curve" else 0,
                    "head_init": "vpt" if start is None else "keep",
                    # A setting is chosen by its last epoch, so that is what another run begins with.
                    "select": "last",
                    "checkpoint_every": f"{max(1, self.protocol.epochs // 10)} epochs",
                },
                "out": str(out),
            }
        )

    def out(self, runs: Path) -> Path:
        """The run's own folder."""
        digest = hashlib.sha256(json.dumps(self.key(), sort_keys=True).encode()).hexdigest()[:12]
        return runs / f"{self.task}-{self.row.name}-{self.stage}-{digest}"

    def train(self, runs: Path, features: FeatureStore | None = None) -> dict[str, Any]:
        """Train, or go on training where a run was interrupted, or read what a finished run has left.

        Returns:
            What the trainer's `results.json` holds; the history goes back to the run that this one began with.

        Raises:
            DivergedError: a loss is not finite.
            ConfigError: the run cannot begin.
        """
        start, before = None, []
        if self.start is not None:
            start, before = self.start.tuned(runs)
        out = self.out(runs)
        outcome = session.run(self.config(out, start), str(self), False, Reporter(False), launch.find_ranks(), features)
        past = len(before)
        after = [entry | {"epoch": entry["epoch"] + past} for entry in outcome["history"]]
        return outcome | {"history": before + after}

    def tuned(self, runs: Path) -> tuple[Path, list[dict[str, Any]]]:
        """The adapter that this run trains, and its history, kept in a folder of its own: made once for all."""
        from filelock import FileLock

        own = runs / TUNED
        own.mkdir(parents=True, exist_ok=True)
        with FileLock(own / f".{self.out(own).name}.lock"):
            outcome = self.train(own)
        return self.out(own) / "adapter", outcome["history"]

    def run(self, runs: Path, features: FeatureStore | None = None) -> dict[str, object]:
        """Train, or go on training where a run was interrupted; the row for the results.

        Args:
            runs: folder of the runs' folders.
            features: where features are kept that other runs need too.

        Raises:
            ConfigError: the run cannot begin.
        """
        try:
            outcome = self.train(runs, features)
        except DivergedError:
            outcome = None
        return self.row_of(outcome, runs)

    @property
    def alone(self) -> bool:
        """Whether nothing else may be trained beside it: it begins with another run's weights, or its own are kept."""
        return self.start is not None or self.keep

    @property
    def read_again(self) -> tuple[str, ...]:
        """Splits that other runs read too: the search is given one test image, which nobody looks at."""
        if self.stage == "search":
            return "train", "val"
        return ("train", "test") if len(self.protocol.seeds) > 1 else ("train",)

    def row_of(self, outcome: dict[str, Any] | None, runs: Path) -> dict[str, object]:
        """The row of a finished run, whose losses are kept where they are wanted.

        A run whose loss is not finite, None, has an accuracy of zero, so that the search goes on without it.
        """
        if outcome is not None and self.stage in ("final", "curve"):
            curves.keep(self.curve_file(runs), self.key(), outcome["history"])
        return self.key() | self._values(outcome)

    def curve_file(self, runs: Path) -> Path:
        """Where the losses of a final run by epoch are kept."""
        return runs.parent / curves.FOLDER / f"{self.out(runs).name}.csv"

    def clear(self, runs: Path) -> None:
        """Remove the run's folder, when its row is kept: a grid of checkpoints would fill a disk."""
        out = self.out(runs)
        for path in (out / "checkpoints", out / "tensorboard") if self.keep else (out,):
            shutil.rmtree(path, ignore_errors=True)

    def _values(self, outcome: dict[str, Any] | None) -> dict[str, object]:
        about = {"version": fastpeft.__version__, "date": datetime.date.today().isoformat()}
        if outcome is None:
            nothing = dict.fromkeys(
                (
                    "train_size", "trained_parameters", "backbone_parameters", "seconds", "ms_per_image",
                    "peak_memory_mb", "saved_mb", "precision",
                ),
                "",
            )  # fmt: skip
            return nothing | about | {"accuracy": "0", "device": launch.find_ranks().device.type}
        accuracy = (
            outcome["history"][-1]["val_accuracy"] if self.stage == "search" else outcome["test_accuracy"]["last"]
        )
        # Of a run that an earlier version has finished nobody counted it.
        saved = outcome.get("saved_mb")
        return about | {
            "accuracy": f"{accuracy:.6f}",
            "train_size": outcome["train_size"],
            "trained_parameters": outcome["trained_parameters"],
            "backbone_parameters": outcome["backbone_parameters"],
            "seconds": f"{outcome['seconds']['total']:.2f}",
            "ms_per_image": f"{outcome['ms_per_image']:.4f}",
            "peak_memory_mb": f"{max(outcome['peak_memory_mb'].values()):.0f}",
            "saved_mb": "" if saved is None else f"{saved:.3f}",
            "precision": str(outcome["precision"]).split()[0].rstrip(","),
            "device": outcome["device"],
        }

    def __str__(self) -> str:
        images = f" {self.images.name}" if self.images.name else ""
        return f"{self.task}{images} {self.row.name} {self.stage} {point_text(self.setting)} seed {self.seed}"
