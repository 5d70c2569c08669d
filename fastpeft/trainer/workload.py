"""What a step computes: the whole model on images, or what follows its frozen prefix on features computed once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.data import Dataset

import fastpeft
from fastpeft.config import ConfigError
from fastpeft.trainer import features, precision
from fastpeft.trainer.feature_store import FeatureStore
from fastpeft.trainer.launch import Ranks
from fastpeft.trainer.order import STEP, Deal, mix
from fastpeft.trainer.report import Reporter
from fastpeft.trainer.task import Task


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


class Workload:
    """Model, splits and number format, ready to train.

    Attributes:
        task: What is trained, on what.
        model: The patched model on its device, frozen weights in the working format.
        dtype: The working format.
        precision: The format in words, with the reason.
        deal: How images are dealt to steps, ranks and micro-batches.
        train_split: Images, or features, with labels.
        val_split: Likewise, or None.
        test_split: Likewise. Images beside encoded training images, if there was no room for their features.
        evaluation_batch: Inputs of an evaluation batch.
        cached: What was computed once, in words, or None.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        deal: Deal,
        ranks: Ranks,
        report: Reporter,
        store: FeatureStore | None = None,
    ) -> None:
        config = task.config
        self.task = task
        self.dtype, self.precision = precision.choose(config.train.precision, ranks.device)
        self.deal = deal
        self.model = model.to(ranks.device)
        precision.cast_frozen(self.model, self.dtype)
        fastpeft.refresh(self.model)
        fastpeft.set_rng_state(self.model, seed=mix(config.train.seed, STEP), step=0, rank=ranks.rank)
        self.train_split, self.val_split, self.test_split = task.splits.train, task.splits.val, task.splits.test
        self.evaluation_batch = features.BATCH
        self.cached: str | None = None
        self._trained: nn.Module = self.model
        self._prefix = None
        self._device, self._forward_dtype = ranks.device, self.dtype
        if config.train.cache_features == "auto" and task.splits.deterministic:
            self._cache(ranks, report, store)

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
        self._prefix = prefix
        self._trained = prefix.decoder
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
            return self._prefix.encode(inputs)

    def train_mode(self) -> None:
        """Turn on what is random in training; a frozen backbone keeps its own dropout off."""
        self.model.train()
        self._trained.train()

    def eval_mode(self) -> None:
        """Turn it off."""
        self.model.eval()
        self._trained.eval()

    def named_trained(self) -> dict[str, nn.Parameter]:
        """Each trained parameter once, by its first name in the model."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def trained_module(self) -> nn.Module:
        """The module that a step calls: the model, or what follows its cached part."""
        return self._trained

    def buffers(self) -> dict[str, torch.Tensor]:
        """Copies of the buffers that a state dict holds, such as a head's running statistics."""
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        state = self.model.state_dict()
        return {name: tensor.detach().cpu().clone() for name, tensor in state.items() if name not in parameters}

    def load_buffers(self, buffers: dict[str, torch.Tensor]) -> None:
        """Put back what `buffers` returned."""
        with torch.no_grad():
            state = self.model.state_dict()
            for name, tensor in buffers.items():
                state[name].copy_(tensor)
