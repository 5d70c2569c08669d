"""What the training loop asks of a kind of run: batches, losses, scores, and the tensors that training changes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils.data import Dataset

import fastpeft
from fastpeft.trainer import precision
from fastpeft.trainer.launch import Ranks
from fastpeft.trainer.order import STEP, Deal, mix
from fastpeft.trainer.report import Reporter

# The full learning rate of a group -> that of a step.
Rate = Callable[[float], float]


class Work(ABC):
    """Model, data and number format of a run, ready to train.

    Attributes:
        task: What is trained, on what; has `config`, `num_classes`, `description`, `build` and `metadata`.
        model: The patched model on its device, frozen weights in the working format.
        dtype: The working format.
        precision: The format in words, with the reason.
        deal: How samples are dealt to steps, ranks and micro-batches.
        ranks: Where this process stands.
        metric: Name of the score that the best epoch is chosen by; `measure` gives it as `<split>_<metric>`.
        train_split, val_split, test_split: The samples; of the last two one may be None.
        cached: What was computed once, in words, or None.
    """

    metric: str
    # What `epochs` counts, in a word.
    part = "epoch"
    train_split: Dataset
    val_split: Dataset | None
    test_split: Dataset | None
    cached: str | None = None

    def __init__(self, task: Any, model: nn.Module, deal: Deal, ranks: Ranks) -> None:
        train = task.config.train
        self.task = task
        self.ranks = ranks
        self.dtype, self.precision = precision.choose(train.precision, ranks.device)
        self.deal = deal
        self.model = model.to(ranks.device)
        precision.cast_frozen(self.model, self.dtype)
        fastpeft.refresh(self.model)
        fastpeft.set_rng_state(self.model, seed=mix(train.seed, STEP), step=0, rank=ranks.rank)
        self._trained: nn.Module = self.model

    @property
    @abstractmethod
    def epochs(self) -> int:
        """Epochs, or where there are none the parts between evaluations."""

    @abstractmethod
    def batches(self, epoch: int, step: int) -> Iterator[tuple[Any, int]]:
        """This rank's micro-batches from a position on, on the CPU, and how many samples of each count."""

    @abstractmethod
    def units(self, keys: list[tuple[int, int]]) -> float:
        """What the sum of a step's losses is divided by: the samples, or something that they have different counts of.

        Args:
            keys: The step's samples over all ranks, as `Deal.keys` gives them.
        """

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """The sum of a micro-batch's losses, with its graph."""

    @abstractmethod
    def rate(self, epoch: int, step: int) -> Rate:
        """The learning rates of a step."""

    @abstractmethod
    def due(self, epoch: int) -> bool:
        """Whether the model is evaluated when so many epochs are complete."""

    @abstractmethod
    def measure(self, split: str, report: Reporter, folder: Path) -> dict[str, float]:
        """Scores of a split with the current weights, in evaluation mode; collective.

        Args:
            split: `val` or `test`.
            report: What shows the progress.
            folder: Where predictions are kept, if any are.

        Returns:
            By names that begin with the split's.
        """

    @abstractmethod
    def preload(self, report: Reporter) -> None:
        """Read what can be read before training, so that what is broken ends the run before it starts."""

    def place(self, epoch: int) -> str:
        """The end of an epoch in a line."""
        return f"epoch {epoch:>{len(str(self.epochs))}}/{self.epochs}"

    def scores(self, test: dict[str, float]) -> dict[str, Any]:
        """What the results say of the test beside the metric, from what `measure` gave for the adapter."""
        return {}

    def train_mode(self) -> None:
        """Turn on what is random in training; a frozen backbone keeps its own dropout off."""
        self.model.train()
        self._trained.train()

    def eval_mode(self) -> None:
        """Turn it off, and score what would be saved: running statistics of all ranks; collective."""
        self._average_statistics()
        self.model.eval()
        self._trained.eval()

    def named_trained(self) -> dict[str, nn.Parameter]:
        """Each trained parameter once, by its first name in the model."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def trained_module(self) -> nn.Module:
        """The module that a step calls."""
        return self._trained

    def whole_readers(self) -> list[tuple[nn.Module, list[nn.Parameter]]]:
        """Modules besides the engine's blocks that read weights which are not their own, and those weights."""
        return []

    def buffers(self) -> dict[str, Tensor]:
        """Copies of the buffers that a state dict holds, such as a head's running statistics; collective.

        Statistics are those of all ranks, which go on from them.
        """
        self._average_statistics()
        return {name: tensor.detach().cpu().clone() for name, tensor in self._state_buffers().items()}

    def _state_buffers(self) -> dict[str, Tensor]:
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in parameters}

    def _average_statistics(self) -> None:
        """Give every rank the mean of all ranks' running statistics.

        Every rank's are of as many images, up to one in a micro-batch. Their updates are linear, so it does not matter
        when, or how often, the mean is taken.
        """
        if self.ranks.world == 1:
            return
        running = [tensor for tensor in self._state_buffers().values() if tensor.is_floating_point()]
        if not running:
            return
        # In fp64 the mean of equal numbers is that number, so buffers that nothing changes keep their bits.
        total = torch.cat([tensor.detach().double().flatten() for tensor in running])
        torch.distributed.all_reduce(total)
        for tensor, mean in zip(running, total.split([tensor.numel() for tensor in running]), strict=True):
            tensor.copy_((mean / self.ranks.world).view_as(tensor))

    def load_buffers(self, buffers: dict[str, Tensor]) -> None:
        """Put back what `buffers` returned."""
        with torch.no_grad():
            state = self.model.state_dict()
            for name, tensor in buffers.items():
                state[name].copy_(tensor)
