"""What takes turns: training steps and inference of the library and of what it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastpeft
from bench.cases import TrainingStep, build
from bench.cpu.shapes import Models, Shape
from fastpeft.engine.stack import MEMORIES

METHODS: dict[str, Callable[[], Any]] = {
    "vpt-1": lambda: fastpeft.VPT(1, dropout=0.0),
    "vpt-200": lambda: fastpeft.VPT(200, dropout=0.0),
    "vpt-200-batch-mask": lambda: fastpeft.VPT(200, dropout_mask="batch"),
    "vpt-200-sample-mask": lambda: fastpeft.VPT(200),
    "lora": lambda: fastpeft.LoRA(8, targets=("q", "k", "v")),
    "serial": lambda: fastpeft.SerialAdapter(64),
    "parallel": lambda: fastpeft.ParallelAdapter(64),
}


class Variant(NamedTuple):
    """An implementation of a method.

    Attributes:
        who: "ours"; "balanced" and "small", which are ours with that memory; "literal"; "peft", with its factors in
            fp32 as is its default, and "peft-cast", with factors in the model's type; "timm".
        method: a key of `METHODS`; "full" for a model that is trained as it is; "inference", which is without prompts
            by timm and with 200 merged ones by the library. timm's "vpt-1" is a frozen model whose position embedding
            is trained: the same gradients pass through all blocks.
    """

    who: str
    method: str

    def __str__(self) -> str:
        return f"{self.who} {self.method}"

    @classmethod
    def of(cls, text: str) -> Variant:
        """Of what `str` made of one."""
        return cls(*text.split())


class Inference:
    """A forward pass without gradients."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model, self.images = model.eval(), images

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """The logits."""
        return self.model(self.images)


def model_of(variant: Variant, shape: Shape, models: Models) -> nn.Module:
    """The model of a variant, ready to be trained or to infer.

    Raises:
        ValueError: there is no such variant.
    """
    who, method = variant
    plain = models.copy(shape)
    if who in ("ours", *MEMORIES):
        memory = None if who == "ours" else who
        if method == "full":
            return fastpeft.patch(plain, memory=memory)
        if method == "inference":
            return fastpeft.merge(fastpeft.patch(plain, METHODS["vpt-200"](), memory=memory))
        return fastpeft.patch(plain, METHODS[method](), memory=memory)
    if who == "timm" and method in ("full", "inference"):
        return plain
    if who == "timm" and method == "vpt-1":
        plain.requires_grad_(False)
        for part in (plain.head, plain.pos_embed):
            part.requires_grad_(True)
        return plain
    if who == "peft-cast":
        return build("peft", METHODS[method](), plain).to(next(plain.parameters()).dtype)
    if who not in ("literal", "peft"):
        raise ValueError(f"no variant {variant}")
    return build(who, METHODS[method](), plain)


def step_of(variant: Variant, shape: Shape, models: Models) -> TrainingStep | Inference:
    """A step of a variant: a call is a training step, or a forward pass."""
    model = model_of(variant, shape, models)
    images, labels = shape.input()
    return Inference(model, images) if variant.method == "inference" else TrainingStep(model, images, labels)
