"""Training steps and inference of one method, by the library, literally and by peft, and the products of all."""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import fastpeft
from bench.cases import METHODS, TrainingStep, batch, build, create_model, has_peft, token_rows
from bench.cost.settings import CLASSES, Settings
from bench.device_parts.rows import Unavailable
from bench.timing import Step, floor
from fastpeft._compat import import_timm

TRAIN, INFERENCE = "train", "inference"
PHASES = (TRAIN, INFERENCE)
OURS, LITERAL, PEFT = "fastpeft", "literal", "peft"


@functools.lru_cache(maxsize=1)
def plain(settings: Settings) -> nn.Module:
    """The model that all variants copy."""
    return create_model(settings.model, CLASSES, image_size(settings)).to(settings.device, settings.torch_dtype)


@functools.cache
def image_size(settings: Settings) -> int:
    """Pixels of a side."""
    timm = import_timm()
    return settings.image_size or timm.get_pretrained_cfg(settings.model).input_size[-1]


class Inference:
    """Logits of a batch, without gradients.

    Attributes:
        model: in evaluation mode.
        images: the batch.
    """

    def __init__(self, model: nn.Module, images: Tensor, compile_options: Mapping[str, Any] | None) -> None:
        self.model, self.images = model.eval(), images
        self._forward = model if compile_options is None else torch.compile(model, **compile_options)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Run the batch."""
        return self._forward(self.images)


class MethodSteps:
    """A method's steps.

    Attributes:
        base: the implementation that ratios are to.
        who: all that have the method.
    """

    base = LITERAL

    def __init__(self, name: str, settings: Settings) -> None:
        """Prepare nothing yet.

        Args:
            name: key of `bench.cases.METHODS`.
            settings: of the run.
        """
        self.name, self.settings = name, settings
        self.who = (OURS, LITERAL, *((PEFT,) if has_peft(METHODS[name]()) else ()))

    def prepare(self, phase: str, who: str, compiled: bool) -> Step:
        """A step of an implementation, on a model of its own.

        Args:
            phase: one of `PHASES`.
            who: one of `self.who`.
            compiled: by torch.compile.

        Raises:
            Unavailable: the model cannot have the method, or what offers it is not installed.
        """
        images, labels = batch(
            self.settings.batch, image_size(self.settings), CLASSES, self.settings.torch_dtype, self.settings.device
        )
        options = {"backend": self.settings.compiler} if compiled else None
        if who == PEFT:
            require_peft()
        try:
            model = build("fused" if who == OURS else who, METHODS[self.name](), plain(self.settings))
        except fastpeft.FastPEFTError as error:
            raise Unavailable(str(error)) from None
        if phase == TRAIN:
            return TrainingStep(model, images, labels, compile_options=options)
        return Inference(_deployed(who, model), images, options)

    def kept(self, step: TrainingStep) -> tuple[Step, nn.Module]:
        """The step's forward pass, and whose parameters do not count, for `bench.memory.saved_bytes`."""
        return step.forward, step.model

    def resident(self, step: TrainingStep | Inference) -> None:
        """Forget what the step has besides its weights, so that its peak is counted from there."""
        optimizer = getattr(step, "optimizer", None)
        if optimizer is not None:
            optimizer.state.clear()

    def floor(self, phase: str) -> Step:
        """The frozen products that every implementation has to run, and those of what is trained."""
        model = build(LITERAL, METHODS[self.name](), plain(self.settings))
        if phase == INFERENCE:
            model.requires_grad_(False)
        return floor(model, token_rows(model, self.settings.batch))

    def trained_percent(self) -> float:
        """Parameters trained, with the head, in percent of all that the model then has."""
        parameters = list(build(LITERAL, METHODS[self.name](), plain(self.settings)).parameters())
        return 100 * sum(p.numel() for p in parameters if p.requires_grad) / sum(p.numel() for p in parameters)


def require_peft() -> None:
    """Have peft to compare with.

    Raises:
        Unavailable: it is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise Unavailable("peft is not installed")


def _deployed(who: str, model: nn.Module) -> nn.Module:
    """The model as it is deployed: what can be folded is."""
    if who == PEFT:
        return copy.deepcopy(model).merge_and_unload()
    if who != OURS:
        return model
    try:
        return fastpeft.merge(model)
    except fastpeft.MethodError:
        # A method that only chooses what is trained, adapters, or prompts whose outputs are carried on.
        return model
