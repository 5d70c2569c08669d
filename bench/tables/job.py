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
from bench.tables import protocol as protocols
from bench.tables.protocol import Point, Protocol, Row
from bench.tables.results import point_text
from fastpeft.config import Config
from fastpeft.trainer import launch, session
from fastpeft.trainer.feature_store import FeatureStore
from fastpeft.trainer.loop import DivergedError
from fastpeft.trainer.report import Reporter


@dataclass(frozen=True)
class Backbone:
    """A pretrained model.

    Attributes:
        name: timm name.
        weights: as of a configuration's `model.weights`, or None.
        image_size: side of the square input in pixels.
    """

    name: str
    weights: str | None
    image_size: int

    @classmethod
    def parse(cls, text: str, image_size: int) -> Backbone:
        """Of NAME or NAME@WEIGHTS."""
        name, _, weights = text.partition("@")
        return cls(name, weights or None, image_size)

    def __str__(self) -> str:
        return self.name if self.weights is None else f"{self.name}@{self.weights}"


@dataclass(frozen=True)
class Job:
    """A run.

    Attributes:
        task: as in the papers.
        folder: of the task under the data's root.
        root: of the data.
        stage: "search" trains on train800 and is scored on val200; "final" trains on both and is tested.
        resize: as of a configuration's `data.resize`.
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
            "point": point_text(self.setting),
        }

    def config(self, out: Path) -> Config:
        """What the trainer is told."""
        point = self.setting
        model: dict[str, Any] = {"name": self.backbone.name, "image_size": self.backbone.image_size}
        if self.backbone.weights is not None:
            model["weights"] = self.backbone.weights
        # The search looks at the validation images alone: one test image is the least that the trainer takes.
        test = {"test_size": 1} if self.stage == "search" else {}
        return Config.model_validate(
            {
                "model": model,
                "data": {
                    "name": "vtab",
                    "root": str(self.root),
                    "task": self.folder,
                    "protocol": self.stage,
                    "resize": self.resize,
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
                    "eval_every": 0,
                    "checkpoint_every": f"{max(1, self.protocol.epochs // 10)} epochs",
                },
                "out": str(out),
            }
        )

    def out(self, runs: Path) -> Path:
        """The run's own folder."""
        digest = hashlib.sha256(json.dumps(self.key(), sort_keys=True).encode()).hexdigest()[:12]
        return runs / f"{self.task}-{self.row.name}-{self.stage}-{digest}"

    def run(self, runs: Path, features: FeatureStore | None = None) -> dict[str, object]:
        """Train, or go on training where a run was interrupted; the row for the results.

        Args:
            runs: folder of the runs' folders.
            features: where features are kept that other runs need too.

        Raises:
            ConfigError: the run cannot begin.
        """
        out = self.out(runs)
        try:
            outcome = session.run(self.config(out), str(self), False, Reporter(False), launch.find_ranks(), features)
        except DivergedError:
            outcome = None
        return self.row_of(outcome)

    def row_of(self, outcome: dict[str, Any] | None) -> dict[str, object]:
        """The row of a finished run.

        A run whose loss is not finite, None, has an accuracy of zero, so that the search goes on without it.
        """
        return self.key() | self._values(outcome)

    def clear(self, runs: Path) -> None:
        """Remove the run's folder, when its row is kept: a grid of checkpoints would fill a disk."""
        shutil.rmtree(self.out(runs), ignore_errors=True)

    def _values(self, outcome: dict[str, Any] | None) -> dict[str, object]:
        about = {"version": fastpeft.__version__, "date": datetime.date.today().isoformat()}
        if outcome is None:
            nothing = dict.fromkeys(
                ("trained_parameters", "backbone_parameters", "seconds", "ms_per_image", "peak_memory_mb", "precision"),
                "",
            )
            return nothing | about | {"accuracy": "0", "device": launch.find_ranks().device.type}
        accuracy = (
            outcome["history"][-1]["val_accuracy"] if self.stage == "search" else outcome["test_accuracy"]["last"]
        )
        return about | {
            "accuracy": f"{accuracy:.6f}",
            "trained_parameters": outcome["trained_parameters"],
            "backbone_parameters": outcome["backbone_parameters"],
            "seconds": f"{outcome['seconds']['total']:.2f}",
            "ms_per_image": f"{outcome['ms_per_image']:.4f}",
            "peak_memory_mb": f"{max(outcome['peak_memory_mb'].values()):.0f}",
            "precision": str(outcome["precision"]).split()[0].rstrip(","),
            "device": outcome["device"],
        }

    def __str__(self) -> str:
        return f"{self.task} {self.row.name} {self.stage} {point_text(self.setting)} seed {self.seed}"
