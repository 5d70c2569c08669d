"""A configured training step on its two paths: fused as the trainer runs it, and literal, with the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastpeft
from bench import literal
from bench.memory import ResidentPeak, cuda_peak
from fastpeft.config import Config
from fastpeft.models.build import build_model
from fastpeft.trainer import precision
from fastpeft.trainer.task import Task, prepare

PATHS = ("fused", "literal")


@dataclass
class Setting:
    """What both paths have in common.

    Attributes:
        task: The trainer's task: data, and how its model is built.
        patched: The patched model with the weights that training starts from, on the CPU.
        device: Where the steps run.
        dtype: The working format the trainer would choose.
        precision: The same in words.
        images, labels: The first training images, as many as a batch holds.
    """

    task: Task
    patched: nn.Module
    device: torch.device
    dtype: torch.dtype
    precision: str
    images: Tensor
    labels: Tensor

    @classmethod
    def of(cls, config: Config, source: str) -> Setting:
        """Open the data of a configuration and read a batch."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        task, patched = prepare(config, source)
        dtype, words = precision.choose(config.train.precision, device)
        count = min(config.train.batch_size, len(task.splits.train))
        images, labels = zip(*(task.splits.train[index] for index in range(count)), strict=True)
        batch = torch.stack(images).to(device), torch.tensor(labels, device=device)
        return cls(task, patched, device, dtype, words, *batch)

    def model(self, path: str) -> nn.Module:
        """Build the model of a path; both have the weights that training starts from."""
        if path == "fused":
            return self._placed(copy.deepcopy(self.patched))
        settings = self.task.config.model
        plain = build_model(settings.name, self.task.num_classes, settings.image_size)
        model = literal.apply(plain, fastpeft.methods.from_dict(self.task.config.method))
        model.load_state_dict(self.patched.state_dict())
        return self._placed(model)

    def _placed(self, model: nn.Module) -> nn.Module:
        model.to(self.device)
        precision.cast_frozen(model, self.dtype)
        return fastpeft.refresh(model) if hasattr(model, "fastpeft_host") else model

    def step(self, path: str, model: nn.Module) -> Callable[[], Tensor]:
        """Return one training step: forward, cross-entropy, backward, AdamW.

        On the fused path whatever comes before the first trained parameter has been computed beforehand, once, where
        the trainer does so; on the literal path nothing is.
        """
        forward, inputs, dtype = model, self.images, self.dtype
        prefix = fastpeft.frozen_prefix(model) if path == "fused" and self.task.splits.deterministic else None
        if prefix is not None and prefix.start > 0 and self.task.config.train.cache_features == "auto":
            with precision.autocast(self.device, dtype):
                inputs = prefix.encode(self.images)
            forward = prefix.decoder
            if inputs.ndim == 2:
                inputs, dtype = inputs.float(), torch.float32
        model.train()
        forward.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

        def step() -> Tensor:
            with precision.autocast(self.device, dtype):
                logits = forward(inputs)
            loss = F.cross_entropy(logits.float(), self.labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return step

    def peak_memory(self, path: str) -> int:
        """Return the peak memory of two training steps in bytes, less what loading model and batch has taken.

        On the CPU this is resident memory of the whole process, which should therefore do nothing else.
        """
        model = self.model(path)

        def run() -> None:
            step = self.step(path, model)
            for _ in range(2):  # the second meets the optimizer's state
                step()

        if self.device.type == "cuda":
            return cuda_peak(run, self.device)
        with ResidentPeak() as peak:
            run()
        return peak.bytes
