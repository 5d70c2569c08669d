"""A training step of mPLUG, and both implementations of a method with equal tensors."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

import fastpeft
from bench.cases import TrainingStep
from bench.literal.mplug import apply_to_mplug
from bench.mplug_cost.cases import LITERAL, METHODS, OURS, WHO, Batch, Case, batch_of
from bench.tables.errors import TableError
from fastpeft.models.mplug import MPlug

# How far two computations of one function may be apart in a number format: of the loss, and of all gradients as one
# vector. Through adapters in 24 layers bf16 alone makes 6% of the latter; what a wrong term does is far beyond.
_APART = {"bf16": (0.01, 0.15), "fp32": (1e-4, 1e-3)}


class MPlugStep(TrainingStep):
    """One training step after another: image tower or its tokens, text, fusion, decoder, loss, backward, AdamW.

    Attributes:
        batch: what it is given.
    """

    def __init__(self, model: MPlug, case: Case, batch: Batch) -> None:
        """Prepare a step.

        Args:
            model: either implementation; put into training mode.
            case: what the batch is for.
            batch: on the model's device.
        """
        super().__init__(model, batch.images, batch.text)
        self._case, self.batch = case, batch

    def forward(self) -> Tensor:
        """The loss."""
        given, model = self.batch, self.model
        if self._case.images == "cached":
            image = model.project_image(given.images)
        else:
            # The tower is frozen in all five methods.
            with torch.no_grad():
                tokens = model.visual_encoder.forward_features(given.images)
            image = model.project_image(tokens)
        memory = model.memory(image, given.ids, given.mask)
        if self._case.task == "caption":
            return model.caption_loss(given.text, memory)
        return model.vqa_loss(given.text, given.weights, given.counts, memory)

    def loss(self) -> Tensor:
        """The loss."""
        return self.forward()


def model_of(case: Case, who: str, backend: str | None = None) -> MPlug:
    """A model of an implementation, with a method whose tensors are not at their start, the same for both.

    Args:
        case: of model and method.
        who: one of `WHO`.
        backend: of the library's operators; its own choice if None.

    Raises:
        TableError: there is no such implementation.
    """
    if who not in WHO:
        raise TableError(f"no implementation '{who}'; there are {', '.join(WHO)}")
    model, method = copy.deepcopy(case.plain()), METHODS[case.method]()
    if who == LITERAL:
        apply_to_mplug(model, method)
    else:
        fastpeft.patch(model, method, **({} if backend is None else {"backend": backend}))
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        # By name, since the order in which methods add their parameters is their own affair.
        for _, parameter in sorted(trained(model).items()):
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=draw))
    return model


def step_of(case: Case, who: str, backend: str | None = None) -> MPlugStep:
    """A step of an implementation."""
    return MPlugStep(model_of(case, who, backend), case, batch_of(case))


def trained(model: MPlug) -> dict[str, Tensor]:
    """What a method trains."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def agreement(literal: MPlugStep, ours: MPlugStep, dtype: str) -> dict[str, float]:
    """How far the first steps of both are apart: the loss, and all gradients as one vector, relative to the literal's.

    Raises:
        TableError: further than the number format explains, or the two train different tensors.
    """
    names = [sorted(trained(step.model)) for step in (literal, ours)]
    if names[0] != names[1]:
        raise TableError(f"{LITERAL} and {OURS} train different tensors: {sorted(set(names[0]) ^ set(names[1]))[0]}")
    losses, gradients = zip(*(_gradients(step) for step in (literal, ours)), strict=True)
    apart = {
        "loss_difference": float(abs(losses[1] - losses[0]) / abs(losses[0])),
        "gradient_difference": float((gradients[1] - gradients[0]).norm() / gradients[0].norm()),
    }
    for (what, found), allowed in zip(apart.items(), _APART[dtype], strict=True):
        if not found <= allowed:
            raise TableError(f"{what} of {OURS} to {LITERAL} is {found:.2g}, more than {allowed:g}")
    return apart


def _gradients(step: MPlugStep) -> tuple[Tensor, Tensor]:
    """The loss, and the gradients by name in one vector; the step is as before."""
    loss = step.forward()
    loss.backward()
    found = []
    for _, parameter in sorted(trained(step.model).items()):
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found.append(gradient.detach().double().flatten())
        parameter.grad = None
    return loss.detach().double(), torch.cat(found)
