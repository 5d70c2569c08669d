"""Prompts that start at the classes' mean read-outs: "CLS" in Fig. 13 of the VPT paper."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import fastpeft
from bench.tables.errors import TableError
from bench.tables.experiment import Experiment
from bench.tables.job import Job
from bench.tables.protocol import Point
from bench.tables.results import Results
from fastpeft.data.vtab import open_vtab
from fastpeft.trainer import launch
from fastpeft.trainer.order import evaluation_batches
from fastpeft.trainer.task import prepare

# More classes than this are gathered in as many centroids.
MOST = 200
_BATCH = 64


@dataclass(frozen=True)
class FromClassMeans(Experiment):
    """A row whose prompts start at the class means of what is trained on, one for each class.

    Attributes:
        means: folder of the files with the means.
    """

    means: Path = field(kw_only=True)

    @classmethod
    def of(cls, experiment: Experiment, means: Path) -> FromClassMeans:
        """The same row on the same task, which has one prompt a class."""
        if experiment.points and "length" in experiment.points[0]:
            raise ValueError("the number of prompts is the number of classes, and is not searched")
        classes = len(open_vtab(experiment.root, experiment.folder, "final")[1])
        row = dataclasses.replace(experiment.row, searched={"length": (min(classes, MOST),)})
        fields = {field.name: getattr(experiment, field.name) for field in dataclasses.fields(experiment)}
        return cls(**fields | {"row": row}, means=means)

    def batches(self, results: Results) -> Iterator[list[Job]]:
        """The search and the final runs, each from means of its own training images."""
        for jobs in super().batches(results):
            yield self._started(jobs, results)

    def job(self, stage: str, point: Point, seed: int) -> Job:
        """One run."""
        own = super().job(stage, point, seed)
        method = {**own.row.method, "init": str(self._file(stage))}
        return dataclasses.replace(own, row=dataclasses.replace(own.row, method=method))

    def _started(self, jobs: list[Job], results: Results) -> list[Job]:
        """The runs, whose means are there if any of them is still to be done."""
        file = self._file(jobs[0].stage)
        if not file.is_file() and not all(results.has(**job.key()) for job in jobs):
            _write(file, class_means(dataclasses.replace(jobs[0], row=_linear(jobs[0])), int(self.points[0]["length"])))
        return jobs

    def _file(self, stage: str) -> Path:
        what = f"{self.backbone} {self.backbone.image_size} {self.root.resolve()} {self.folder}"
        return self.means / f"{self.task}-{stage}-{hashlib.sha256(what.encode()).hexdigest()[:12]}.safetensors"


def _linear(job: Job):
    return dataclasses.replace(job.row, method={"name": "linear"}, searched={})


@torch.no_grad()
def class_means(job: Job, count: int) -> Tensor:
    """Means, (count, d), over the classes of what a linear head would read of a run's training images.

    Fewer than there are classes: centroids by k-means instead.

    Raises:
        ConfigError: the run cannot begin.
        TableError: a class has no training image.
    """
    task, model = prepare(job.config(Path("unused")), str(job))
    device = launch.find_ranks().device
    prefix = fastpeft.frozen_prefix(model.to(device))
    features, labels = [], []
    for images, classes in evaluation_batches(task.splits.train, _BATCH, 0, 1, 0):
        features.append(prefix.encode(images.to(device)).float().cpu())
        labels += classes.tolist()
    return means_of(torch.cat(features), torch.tensor(labels), task.num_classes, count)


def means_of(features: Tensor, labels: Tensor, classes: int, count: int) -> Tensor:
    """The mean feature of each class; for fewer than there are classes centroids of all features.

    Args:
        features: (n, d).
        labels: (n,).
        classes: how many there are.
        count: rows of the result.

    Raises:
        TableError: a class has no feature.
    """
    if count < classes:
        from scipy.cluster.vq import kmeans2

        centroids, _ = kmeans2(features.double().numpy(), count, seed=0, minit="++", missing="raise")
        return torch.from_numpy(centroids).float()
    sizes = torch.bincount(labels, minlength=classes)
    if not sizes.all():
        raise TableError(f"class {int((sizes == 0).nonzero()[0])} has no training image, so its prompt has no mean")
    sums = torch.zeros(classes, features.shape[1], dtype=torch.float64).index_add_(0, labels, features.double())
    return (sums / sizes[:, None]).float()


def _write(file: Path, means: Tensor) -> None:
    from safetensors.torch import save_file

    # Another worker may do the same: whoever is last replaces the other's file by one like it.
    own = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"prompts": means}, own)
        own.replace(file)
    except OSError as error:
        raise TableError(f"{file}: cannot be written: {error.strerror or error}") from error
