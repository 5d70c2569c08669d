"""From a configuration to data and a patched model, with every mistake named by its section before training starts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastpeft
from fastpeft.config import Config, ConfigError
from fastpeft.data import Splits, open_splits
from fastpeft.errors import FastPEFTError
from fastpeft.trainer import heads, optim
from fastpeft.trainer.order import INIT, mix


@dataclass
class Task:
    """What is trained, on what.

    Attributes:
        config: The run.
        source: The configuration's file, for messages.
        splits: The images.
        num_classes: Outputs of the head.
        mean: Channel means of the input normalisation.
        std: Channel deviations of the input normalisation.
    """

    config: Config
    source: str
    splits: Splits
    num_classes: int
    mean: list[float]
    std: list[float]

    @property
    def init_seed(self) -> int:
        """The seed under which the model is built, random base weights included."""
        return mix(self.config.train.seed, INIT)

    @property
    def description(self) -> str:
        """The data in a line."""
        return self.splits.description

    def metadata(self) -> dict[str, Any]:
        """What is written into an adapter's configuration, so that it can be used without the run's."""
        config = self.config
        return {
            "base_model": config.model.name,
            "weights": config.model.weights,
            **({"model_options": config.model.options} if config.model.options else {}),
            "start": config.model.start,
            "init_seed": self.init_seed,
            "image_size": config.model.image_size,
            "num_classes": self.num_classes,
            "mean": self.mean,
            "std": self.std,
            "resize": config.data.resize,
            "class_names": self.splits.class_names,
        }

    def use(self, adapter: Path) -> str:
        """What can be done with the run's adapter next: a command."""
        return f"python -m fastpeft.predict {adapter} IMAGE..."

    def build(self) -> nn.Module:
        """A new fp32 model on the CPU, patched and initialised; the same one every time."""
        from fastpeft.models.build import build_model, start_from

        model_config, train = self.config.model, self.config.train
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.init_seed)
            with blame(self.source, "model"):
                model = build_model(
                    model_config.name,
                    self.num_classes,
                    model_config.image_size,
                    weights=model_config.weights,
                    **model_config.options,
                )
            if model_config.start is not None:
                with blame(self.source, "model.start"):
                    start_from(model, model_config.start)
            with blame(self.source, "method"):
                fastpeft.patch(model, fastpeft.methods.from_dict(self.config.method), backend=self.config.model.backend)
            if train.head_init == "vpt":
                head = fastpeft.parameter_groups(model).get("head", [])
                heads.initialise(head, self.num_classes, mix(train.seed, INIT, 1))
        return model


def prepare(config: Config, source: str) -> tuple[Task, nn.Module]:
    """Open the data, build the model, and check that they fit each other and the optimizer.

    Raises:
        ConfigError: Something does not; one line with the file and the section.
    """
    from fastpeft.models.build import default_mean_std

    with blame(source, "model"):
        mean, std = default_mean_std(config.model.name)
    mean, std = list(config.model.mean or mean), list(config.model.std or std)
    with blame(source, "data"):
        splits = open_splits(config.data, config.model.image_size, mean, std)
    num_classes = config.model.num_classes or splits.num_classes
    if splits.num_classes > num_classes:
        raise ConfigError(
            f"{source}: model.num_classes: labels of '{config.data.name}' go up to {splits.num_classes - 1}, outside a "
            f"head of {num_classes} classes; give at least {splits.num_classes}, or leave the key out"
        )
    task = Task(config, source, splits, num_classes, mean, std)
    model = task.build()
    with blame(source, None):
        optim.base_rates(fastpeft.parameter_groups(model), config.train)
    return task, model


@contextlib.contextmanager
def blame(source: str | Path, section: str | None) -> Iterator[None]:
    """Say of the library's errors which file and which section of it asked for what went wrong."""
    try:
        yield
    except FastPEFTError as error:
        message = " ".join(str(error).split())
        if section is not None and not message.startswith(f"{section}:"):
            message = f"{section}: {message}"
        raise ConfigError(f"{source}: {message}") from error
