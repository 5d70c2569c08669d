"""One of several runs that are trained side by side: its tensors, its optimizer, and how they are kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fastpeft
from fastpeft.config import Config
from fastpeft.trainer import optim
from fastpeft.trainer.order import Deal
from fastpeft.trainer.stepper import state_keys
from fastpeft.trainer.workload import Workload


@dataclass
class Run:
    """A run.

    Attributes:
        index: of its configuration.
        config: what it is.
        deal: its order of images.
        parameters: what it trains, by the names of the model.
        tensors: its parameters and buffers, by their names in the workload's trained module.
        optimizer: over its parameters.
        lost: its loss or a tensor is no longer finite.
        history: one entry an epoch, as the trainer's.
    """

    index: int
    config: Config
    deal: Deal
    parameters: dict[str, nn.Parameter]
    tensors: dict[str, Tensor]
    optimizer: torch.optim.Optimizer
    lost: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)
    _loss: float = 0.0
    _images: int = 0

    @classmethod
    def begin(cls, work: Workload, config: Config, index: int, start: Mapping[str, Tensor]) -> Run:
        """A run before its first step.

        Args:
            work: what all runs of the computation have in common.
            config: the run's.
            index: its number.
            start: what training changes, as `starting_tensors` gives it for the run's seed.
        """
        trained = work.named_trained()
        copies = {name: tensor.to(next(iter(trained.values())).device, copy=True) for name, tensor in start.items()}
        parameters = {name: nn.Parameter(copies[name]) for name in trained}
        groups = {
            group: [(name, parameters[name]) for name, _ in members]
            for group, members in fastpeft.parameter_groups(work.model).items()
        }
        optimizer = optim.build_optimizer(groups, work.task.num_classes, config.train)
        deal = Deal(work.deal.size, work.deal.batch_size, config.train.seed, work.deal.drop_last, 1)
        # What decodes features is a module that holds the model under this name.
        tensors = {f"model.{name}": tensor for name, tensor in (copies | parameters).items()}
        return cls(index, config, deal, parameters, tensors, optimizer)

    def note(self, loss: float, images: int) -> None:
        """A step's loss, summed over its images."""
        self.lost = not math.isfinite(loss)
        self._loss += loss
        self._images += images

    def end_epoch(self) -> None:
        """Add the epoch's entry to the history."""
        if not self.lost:
            self.history.append({"epoch": len(self.history) + 1, "train_loss": self._loss / self._images})
        self._loss, self._images = 0.0, 0

    def finite(self) -> bool:
        """Whether parameters and the optimizer's state are."""
        states = [value for state in self.optimizer.state.values() for value in state.values() if value is not None]
        return all(bool(tensor.isfinite().all()) for tensor in [*self.parameters.values(), *states])

    def kept(self, place: int) -> dict[str, Tensor]:
        """All that goes on changing, on the CPU, by names that begin with the run's place among others."""
        found = {f"{place}/tensor/{name}": tensor for name, tensor in self.tensors.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{place}/{key}/{name}"] = value
        return {name: tensor.detach().cpu().clone() for name, tensor in found.items()}

    @torch.no_grad()
    def load(self, kept: Mapping[str, Tensor], place: int) -> None:
        """Go on from what `kept` gave."""
        for name, tensor in self.tensors.items():
            tensor.copy_(kept[f"{place}/tensor/{name}"])
        for name, parameter in self.parameters.items():
            keys = [key for key in (*state_keys(self.optimizer), "step") if f"{place}/{key}/{name}" in kept]
            for key in keys:
                value = kept[f"{place}/{key}/{name}"]
                # Like torch: a step is counted on the CPU unless the optimizer is fused.
                there = key != "step" or self.optimizer.defaults.get("fused")
                self.optimizer.state[parameter][key] = value.to(parameter.device, copy=True) if there else value.clone()


def starting_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what training changes: trained parameters, and all buffers of a state dict, on the CPU."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}
    return {name: tensor.detach().cpu().clone() for name, tensor in (trained | buffers).items()}
