"""The runs of a row's seeds asked together: the mean of their probabilities.

Prompts that share a backbone are asked in one pass, other methods one after the other.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import fastpeft
from bench.tables.experiment import Experiment
from bench.tables.job import Job
from bench.tables.results import VALUES, Results, point_text
from fastpeft.config import Config
from fastpeft.predict import Predictor
from fastpeft.trainer import launch, memory, precision, results
from fastpeft.trainer.feature_store import FeatureStore
from fastpeft.trainer.loop import DivergedError
from fastpeft.trainer.order import evaluation_batches
from fastpeft.trainer.task import prepare

STAGE = "ensemble"
_BATCH = 32


@dataclass(frozen=True)
class Ensemble(Experiment):
    """A row's search and final runs, and the ensemble of the latter."""

    @property
    def size(self) -> int:
        """Number of runs, the ensemble among them."""
        return super().size + 1

    def batches(self, results: Results) -> Iterator[list[Job | EnsembleJob]]:
        """The search, the final runs, the ensemble."""
        yield self.search()
        members = [dataclasses.replace(self.of_best(results, "final", seed), keep=True) for seed in self.protocol.seeds]
        yield members
        yield [EnsembleJob(tuple(members))]


@dataclass(frozen=True)
class EnsembleJob:
    """Final runs of one setting, asked together.

    A member whose row is in the results and whose weights are gone is trained again.

    Attributes:
        members: one a seed.
    """

    members: tuple[Job, ...]
    stage = STAGE
    alone = True

    @property
    def task(self) -> str:
        """The members'."""
        return self.members[0].task

    @property
    def row(self):
        """The members'."""
        return self.members[0].row

    @property
    def backbone(self):
        """The members'."""
        return self.members[0].backbone

    @property
    def protocol(self):
        """The members'."""
        return self.members[0].protocol

    @property
    def read_again(self) -> tuple[str, ...]:
        """The members'."""
        return self.members[0].read_again

    def key(self) -> dict[str, object]:
        """What its row in the results is found by: the first member's, and how many there are."""
        point = point_text(self.members[0].setting | {"members": len(self.members)})
        return self.members[0].key() | {"stage": STAGE, "point": point}

    def out(self, runs: Path) -> Path:
        """The first member's folder."""
        return self.members[0].out(runs)

    def config(self, out: Path) -> Config:
        """What the trainer was told for the first member: the data, and how images are prepared."""
        return self.members[0].config(out)

    def run(self, runs: Path, features: FeatureStore | None = None) -> dict[str, object]:
        """Train the members that are not there, and test them together; the row for the results.

        An ensemble of which a member's loss is not finite has an accuracy of zero, as that run has.
        """
        about = {"version": fastpeft.__version__, "date": datetime.date.today().isoformat()}
        try:
            outcomes = [member.train(runs, features) for member in self.members]
        except DivergedError:
            return self.key() | dict.fromkeys(VALUES, "") | about | {
                "accuracy": "0", "device": launch.find_ranks().device.type
            }  # fmt: skip
        folders = [member.out(runs) / "adapter" for member in self.members]
        device = launch.find_ranks().device
        dtype, _ = precision.choose("auto", device)
        task, _ = prepare(self.config(self.out(runs)), str(self))
        memory.forget_peak(device)
        started = time.perf_counter()
        right = count = 0
        ask = Together(folders, device, dtype) if self.one_pass else InTurn(folders, device, dtype)
        for images, labels in evaluation_batches(task.splits.test, _BATCH, 0, 1, 0):
            right += int((ask(images.to(device)).argmax(1).cpu() == labels).sum())
            count += len(labels)
        seconds = time.perf_counter() - started
        return self.key() | about | {
            "accuracy": f"{right / count:.6f}",
            "train_size": outcomes[0]["train_size"],
            "trained_parameters": sum(outcome["trained_parameters"] for outcome in outcomes),
            "backbone_parameters": outcomes[0]["backbone_parameters"],
            "seconds": f"{seconds:.2f}",
            "ms_per_image": f"{1000 * seconds / count:.4f}",
            "peak_memory_mb": f"{max(results.peak_memory_mb(device).values()):.0f}",
            # Nothing is trained here.
            "saved_mb": "",
            "precision": str(dtype).removeprefix("torch."),
            "device": device.type,
        }  # fmt: skip

    @property
    def one_pass(self) -> bool:
        """Whether the members differ in prompts and heads alone."""
        return [part["name"] for part in self.row.parts] == ["vpt"] and self.members[0].start is None

    def clear(self, runs: Path) -> None:
        """Remove the members' folders."""
        for member in self.members:
            dataclasses.replace(member, keep=False).clear(runs)

    def __str__(self) -> str:
        return f"ensemble of {len(self.members)} of {self.members[0]}"


class Together:
    """Prompts on one backbone, in one pass."""

    def __init__(self, folders: Sequence[Path], device: torch.device, dtype: torch.dtype) -> None:
        base = fastpeft.unpatch(Predictor(folders[0]).model, discard=True)
        self._model = _working(fastpeft.PromptEnsemble(base, folders), device, dtype)
        self._device, self._dtype = device, dtype

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Mean probabilities, (B, classes)."""
        with precision.autocast(self._device, self._dtype):
            return self._model(images).float().softmax(-1).mean(0)


class InTurn:
    """Any adapters, each a model of its own."""

    def __init__(self, folders: Sequence[Path], device: torch.device, dtype: torch.dtype) -> None:
        self._models = [_working(Predictor(folder).model, device, dtype) for folder in folders]
        self._device, self._dtype = device, dtype

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Mean probabilities, (B, classes)."""
        with precision.autocast(self._device, self._dtype):
            return torch.stack([model(images).float().softmax(-1) for model in self._models]).mean(0)


def _working(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model in the number format that its members were trained in."""
    model = model.to(device).eval()
    precision.cast_frozen(model, dtype)
    return fastpeft.refresh(model)
