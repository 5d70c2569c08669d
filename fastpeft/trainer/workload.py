"""What a step computes: the whole model on images, or what follows its frozen prefix on features computed once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.data import Dataset

import fastpeft
from fastpeft.config import ConfigError
from fastpeft.data.dataset import ImageDataset
from fastpeft.trainer import features, optim, precision
from fastpeft.trainer.evaluate import Spare, evaluate
from fastpeft.trainer.feature_store import FeatureStore
from fastpeft.trainer.launch import Ranks
from fastpeft.trainer.order import Deal, evaluation_batches, parts_of, training_batches
from fastpeft.trainer.report import Reporter
from fastpeft.trainer.task import Task
from fastpeft.trainer.work import Rate, Work


def deal_images(task: Task, model: nn.Module, ranks: Ranks) -> Deal:
    """Decide which rank computes what.

    Raises:
        ConfigError: The batch cannot be dealt evenly, or would fail in the middle of an epoch.
    """
    train, size = task.config.train, len(task.splits.train)
    parts = ranks.world * train.grad_accumulation
    deal = Deal(size, min(train.batch_size, size), train.seed, train.drop_last, parts)
    if train.batch_size % parts:
        raise ConfigError(
            f"{task.source}: train.batch_size: {train.batch_size} images cannot be dealt evenly to {ranks.world} "
            f"rank(s) times {train.grad_accumulation} accumulation step(s)"
        )
    normalised = any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) and any(p.requires_grad for p in module.parameters())
        for module in model.modules()
    )
    if normalised and deal.smallest_part() == 1:
        raise ConfigError(
            f"{task.source}: train.batch_size: the head's batch normalisation needs two images in every micro-batch, "
            f"and {size} images in batches of {deal.batch_size} leave one with a single image; choose another batch "
            "size, or train.drop_last: true"
        )
    return deal


class Halves(nn.Module):
    """A model with a frozen prefix, of which a call runs what follows the prefix, or the prefix alone.

    At ZeRO stage 3 a forward pass, the prefix's too, begins and ends with the module that DeepSpeed was given.

    Attributes:
        model: The whole.
        encoder: The prefix, as a module whose call can be seen from outside.
    """

    def __init__(self, model: nn.Module, prefix: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.encoder = _Encoder(prefix)
        # Not registered: the weights are the model's.
        self.__dict__["_decoder"] = prefix.decoder

    def forward(self, inputs: torch.Tensor, *, encode: bool = False) -> torch.Tensor:
        """Logits of features; or features of images."""
        return self.encoder(inputs) if encode else self._decoder(inputs)


class _Encoder(nn.Module):
    def __init__(self, prefix: nn.Module) -> None:
        super().__init__()
        # Not registered: the weights are the model's.
        self.__dict__["_prefix"] = prefix

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self._prefix.encode(images)


class Workload(Work):
    """A classifier's run.

    Attributes:
        train_split: Images, or features, with labels.
        val_split: Likewise, or None.
        test_split: Likewise. Images beside encoded training images, if there was no room for their features.
        evaluation_batch: Inputs of an evaluation batch.
    """

    metric = "accuracy"

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        deal: Deal,
        ranks: Ranks,
        report: Reporter,
        store: FeatureStore | None = None,
    ) -> None:
        super().__init__(task, model, deal, ranks)
        config = task.config
        self.train_split, self.val_split, self.test_split = task.splits.train, task.splits.val, task.splits.test
        self.evaluation_batch = features.BATCH
        self._device, self._forward_dtype = ranks.device, self.dtype
        if config.train.cache_features == "auto" and task.splits.deterministic:
            self._cache(ranks, report, store)

    @property
    def epochs(self) -> int:
        """Passes over the images."""
        return self.task.config.train.epochs

    def batches(self, epoch: int, step: int) -> Iterator[tuple[tuple[torch.Tensor, torch.Tensor], int]]:
        """Inputs and labels."""
        parts = parts_of(self.deal, self.ranks.rank, self.ranks.world, epoch, step, self.epochs)
        for inputs, labels, counted in training_batches(self.train_split, parts, self.task.config.data.workers):
            yield (inputs, labels), counted

    def units(self, keys: list[tuple[int, int]]) -> float:
        """The images."""
        return len(keys)

    def loss(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Cross-entropy."""
        inputs, labels = batch
        return F.cross_entropy(self.forward(inputs).float(), labels, reduction="sum")

    def rate(self, epoch: int, step: int) -> Rate:
        """A share of every group's full rate."""
        factor = optim.rate_factor(self.task.config.train, epoch, step, self.deal.steps)
        return lambda base: base * factor

    def due(self, epoch: int) -> bool:
        """At every so many epochs, and at the last."""
        every = self.task.config.train.eval_every
        return epoch == self.epochs or bool(every and epoch % every == 0)

    def measure(self, split: str, report: Reporter, folder: Path) -> dict[str, float]:
        """Accuracy and loss."""
        dataset = {"val": self.val_split, "test": self.test_split}[split]
        ranks, workers = self.ranks, self.task.config.data.workers
        batches = evaluation_batches(dataset, self.evaluation_batch, ranks.rank, ranks.world, workers)
        with report.bar(f"evaluating on {split}", len(dataset)) as advance:
            counts = evaluate(
                lambda inputs: self.forward(self.encoded(inputs, dataset)),
                batches,
                ranks.device,
                lambda images: advance(images * ranks.world),
                self._spare(dataset),
            )
        return {f"{split}_accuracy": counts.accuracy, f"{split}_loss": counts.loss}

    def _spare(self, dataset: Dataset) -> Spare | None:
        """What a rank runs that has fewer batches of a split than another, where a forward pass is collective."""
        if self.task.config.train.zero < 3 or self.ranks.world == 1:
            return None
        rounds = math.ceil(len(dataset) / self.ranks.world / self.evaluation_batch)
        return Spare(dataset[0][0].unsqueeze(0), rounds)

    def preload(self, report: Reporter) -> None:
        """Decode the splits that are not encoded."""
        for name in ("train", "val", "test"):
            split = getattr(self, f"{name}_split")
            if isinstance(split, ImageDataset):
                features.preload(split, report, name)

    def _cache(self, ranks: Ranks, report: Reporter, store: FeatureStore | None) -> None:
        """Encode splits once, if the model has a frozen prefix whose features are small enough to keep.

        Training images, which every epoch reads, come first; a split for which no room is left is encoded as it is
        evaluated.
        """
        prefix = fastpeft.frozen_prefix(self.model)
        if prefix is None or prefix.start == 0:
            # Embedded patches take more memory than pixels and little time to compute.
            return
        self.model.eval()
        splits = {"train": self.train_split, "val": self.val_split, "test": self.test_split}
        present = {name: split for name, split in splits.items() if split is not None}
        chosen = features.choose(prefix, present, ranks, self.dtype)
        if "train" not in chosen:
            return
        config = self.task.config
        for name in chosen:
            encoded = features.encode(
                prefix, present[name], ranks, self.dtype, config.data.workers, report, name, config, store
            )
            setattr(self, f"{name}_split", encoded)
        self.cached = prefix.description
        self._trained = Halves(self.model, prefix)
        if self.train_split.features.ndim == 2:
            # Only the head is left, and full precision costs nothing there.
            self._forward_dtype = torch.float32

    def forward(self, inputs: torch.Tensor, tensors: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Logits of a batch of images, or of their features where the training split is encoded.

        Args:
            inputs: As `train_split` has them, or as `encoded` gives them.
            tensors: Parameters and buffers of `trained_module()` to run with in place of its own, by their names in it.
        """
        inputs = self.converted(inputs)
        with precision.autocast(self._device, self._forward_dtype):
            if tensors is not None:
                return functional_call(self._trained, dict(tensors), (inputs,), tie_weights=False)
            return self._trained(inputs)

    def converted(self, inputs: torch.Tensor) -> torch.Tensor:
        """Features in the format in which `forward` takes them; images as they are."""
        return inputs if self.cached is None else inputs.to(self._forward_dtype)

    def encoded(self, inputs: torch.Tensor, split: Dataset) -> torch.Tensor:
        """What `forward` takes, of a batch of one of the splits: the batch itself, unless only this split is images."""
        if self.cached is None or isinstance(split, features.Features):
            return inputs
        with precision.autocast(self._device, self.dtype):
            return self._trained(inputs, encode=True)

    def whole_readers(self) -> list[tuple[nn.Module, list[nn.Parameter]]]:
        """The prefix, which reads the model's class token and positions."""
        if self.cached is None:
            return []
        return [(self._trained.encoder, list(self.model.parameters(recurse=False)))]
