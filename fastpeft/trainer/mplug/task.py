"""What an mPLUG run trains, on what: data, tokenizer, and the patched model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

import fastpeft
from fastpeft.config import ConfigError
from fastpeft.config_mplug import MPlugRun
from fastpeft.data.vl_transforms import EvalTransform, ImageFiles, TrainTransform
from fastpeft.models.mplug.tokenizer import Tokenizer
from fastpeft.trainer import optim
from fastpeft.trainer.launch import Ranks
from fastpeft.trainer.mplug.build import build_mplug, normalisation
from fastpeft.trainer.order import INIT, Deal, Stream, mix
from fastpeft.trainer.task import blame


@dataclass
class Split:
    """Samples of training, validation or test.

    Attributes:
        dataset: With `images`, an `ImageFiles`.
        source: The captions or questions that it is of.
        used: Numbers of the images that its samples are about.
        gold: What its texts are scored by, where that is not in `source`; None if nothing is known.
    """

    dataset: Dataset
    source: Any
    used: list[int]
    gold: Any = None

    def __len__(self) -> int:
        return len(self.dataset)


@dataclass
class MPlugTask:
    """What is trained, on what.

    Attributes:
        config: The run.
        source: The configuration's file, for messages.
        tokenizer: Of all texts.
        splits: By name, `train` and one or both of `val` and `test`.
        description: The data in a line.
        mean: Channel means of the input normalisation.
        std: Channel deviations of the input normalisation.
        answers: What evaluation chooses from; None if it generates.
    """

    config: MPlugRun
    source: str
    tokenizer: Tokenizer
    splits: dict[str, Split]
    description: str
    mean: list[float]
    std: list[float]
    num_classes: int = 0
    answers: list[str] | None = None

    @property
    def init_seed(self) -> int:
        """The seed under which the model is built, random base weights included."""
        return mix(self.config.train.seed, INIT)

    def build(self) -> nn.Module:
        """A new fp32 model on the CPU, patched and initialised; the same one every time."""
        return built(self.config, self.source, self.tokenizer)

    def metadata(self) -> dict[str, Any]:
        """What is written into an adapter's configuration, so that it can be used without the run's."""
        model = self.config.model.model_dump(mode="json", exclude={"backend", "memory"})
        task = self.config.data.model_dump(mode="json", include={"name", "route", "prompt", "template"})
        return {
            "base_model": self.config.model.name,
            "mplug": model,
            "task": task,
            "init_seed": self.init_seed,
            "mean": self.mean,
            "std": self.std,
        }

    def use(self, adapter: Path) -> str:
        """What can be done with the run's adapter next."""
        return f"fastpeft.load(model, '{adapter}') on the same base; predictions are beside it"


def prepared(
    config: MPlugRun,
    source: str,
    tokenizer: Tokenizer,
    split: Callable[[int], dict[str, Split]],
    description: str,
) -> tuple[MPlugTask, nn.Module]:
    """A task with its model, after a look at whether they fit the optimizer.

    Args:
        config: The run.
        source: Its file, for messages.
        tokenizer: Of all texts.
        split: From the side of the model's input to the splits.
        description: The data in a line.

    Raises:
        ConfigError: They do not; one line with the file and the section.
    """
    with blame(source, "model"):
        mean, std = normalisation(config.model)
    model = built(config, source, tokenizer)
    with blame(source, "method"):
        description += _rest(config, model)
    with blame(source, None):
        optim.base_rates(fastpeft.parameter_groups(model), config.train)
    with blame(source, "data"):
        splits = split(model.config.image_size)
    return MPlugTask(config, source, tokenizer, splits, description, mean, std), model


def _rest(config: MPlugRun, model: nn.Module) -> str:
    """Freeze what would be trained and is never run.

    Without that the optimizer's decay would move it where a rank's share of all parameters is one tensor, and has a
    gradient, if only zeros, throughout.

    Returns:
        What was frozen, in words that follow the data's; "" for nothing.

    Raises:
        ConfigError: Nothing else is trained.
    """
    if getattr(config.data, "route", "fused") == "fused":
        return ""
    parts = ("text_encoder.", "fusion_encoder.")
    idle = [p for name, p in model.named_parameters() if p.requires_grad and name.startswith(parts)]
    for parameter in idle:
        parameter.requires_grad_(False)
    if not fastpeft.trainable_parameters(model):
        raise ConfigError("all that is trained is in text encoder and fusion, and data.route 'image' runs neither")
    count = sum(parameter.numel() for parameter in idle)
    return f"; route image: {count:,} parameters of text encoder and fusion stay as they are" if count else ""


def built(config: MPlugRun, source: str, tokenizer: Tokenizer) -> nn.Module:
    """What `MPlugTask.build` does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(config.train.seed, INIT))
        with blame(source, "model"):
            model = build_mplug(config.model, tokenizer)
        with blame(source, "method"):
            method = fastpeft.methods.from_dict(config.method)
            fastpeft.patch(model, method, backend=config.model.backend, memory=config.model.memory)
    return model


def deal_samples(task: MPlugTask, model: nn.Module, ranks: Ranks) -> Deal:
    """Decide which rank computes what.

    Raises:
        ConfigError: The batch cannot be dealt evenly.
    """
    train, size = task.config.train, len(task.splits["train"])
    parts = ranks.world * train.grad_accumulation
    if train.batch_size % parts:
        raise ConfigError(
            f"{task.source}: train.batch_size: {train.batch_size} samples cannot be dealt evenly to {ranks.world} "
            f"rank(s) times {train.grad_accumulation} accumulation step(s)"
        )
    if train.steps is None:
        deal = Deal(size, min(train.batch_size, size), train.seed, train.drop_last, parts)
        total = train.epochs * deal.steps
        if warmup_of(task.config) >= total:
            raise ConfigError(
                f"{task.source}: train.warmup_steps: {warmup_of(task.config)} steps of warm-up in a run of {total}"
            )
        return deal
    every = train.steps if train.eval_every == 0 else train.eval_every or max(1, train.steps // 10)
    return Stream(size, train.batch_size, train.seed, False, parts, train.steps, min(every, train.steps))


def warmup_of(config: MPlugRun) -> int:
    """Steps of the warm-up."""
    ratio = config.data.data_ratio if config.train.warmup_by_ratio else 1.0
    return round(config.train.warmup_steps * ratio)


def image_files(config: MPlugRun, paths: list[Path], size: int, *, training: bool) -> ImageFiles:
    """The images of a split as the configuration wants them.

    Args:
        config: The run.
        paths: Their files.
        size: Side of the model's input.
        training: Whether they are augmented.
    """
    mean, std = normalisation(config.model)
    how = config.data.augment
    if not training or how == "none":
        return ImageFiles(paths, EvalTransform(size, mean, std))
    operations = 2 if how == "rand_augment" else 0
    transform = TrainTransform(size, flip=how != "crop", operations=operations, mean=mean, std=std)
    return ImageFiles(paths, transform, config.data.seed)
