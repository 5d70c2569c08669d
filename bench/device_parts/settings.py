"""What to run on: read from the command line once, shared by all parts."""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.cases import METHODS, batch, create_model
from bench.mplug_cost.cases import METHODS as MPLUG_METHODS
from fastpeft.ops.choose import BACKENDS, OPERATORS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLASSES = 100
# What mPLUG's methods are called among all: "mplug-lora" and the like.
MPLUG = tuple(f"mplug-{name}" for name in MPLUG_METHODS)
# In which operators are checked.
FORMATS = ("bfloat16", "float16", "float32")
# Backends whose training steps are run; operators have rows of every backend that there is.
STEP_BACKENDS = ("reference", "triton")

VIT_B, VIT_L, VIT_H = "vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224"


@dataclass(frozen=True)
class Shape:
    """A model and what is put into it.

    Attributes:
        model: timm name.
        image_size: pixels.
        batch: images a step.
        tiny: two narrow blocks instead of the model's own.
    """

    model: str
    image_size: int
    batch: int
    tiny: bool = False

    def __str__(self) -> str:
        return f"{self.model}{'-tiny' if self.tiny else ''}-{self.image_size}px/b{self.batch}"


class Settings:
    """What to run on.

    Attributes:
        device, tiny, turns: as on the command line.
        dtype: of timed steps and operators.
        backends: of training steps.
        methods: names in `METHODS` and `MPLUG`.
        operators: names in `fastpeft.ops.choose.OPERATORS`.
        seed: of the operators' inputs; drawn afresh if None.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device(arguments.device)
        self.tiny: bool = arguments.tiny
        self.dtype: str = arguments.dtype or ("bfloat16" if self.cuda else "float32")
        self.turns: int = arguments.turns or (3 if self.tiny else 20)
        self.seed: int | None = arguments.seed
        self.backends: list[str] = arguments.backends.split(",") if arguments.backends else list(STEP_BACKENDS)
        self.methods: list[str] = arguments.methods.split(",") if arguments.methods else [*METHODS, *MPLUG]
        self.operators: list[str] = arguments.operators.split(",") if arguments.operators else list(OPERATORS)
        for option, given, known in (
            ("methods", self.methods, (*METHODS, *MPLUG)),
            ("operators", self.operators, OPERATORS),
            ("backends", self.backends, BACKENDS),
        ):
            unknown = [name for name in given if name not in known]
            if unknown:
                raise SystemExit(f"--{option}: no {', '.join(unknown)}; there are {', '.join(known)}")
        self._given = arguments.model, arguments.image_size, arguments.batch

    @property
    def cuda(self) -> bool:
        """Whether the device is an NVIDIA GPU."""
        return self.device.type == "cuda"

    @property
    def batch(self) -> int:
        """Images of a timed step."""
        return self._given[2] or (2 if self.tiny else 64 if self.cuda else 8)

    @property
    def chosen(self) -> bool:
        """Whether the command names one model, which then is the only one."""
        return self._given[0] is not None

    def among(self, names: Iterable[str]) -> list[str]:
        """Those of the names that the command asks for, in their own order."""
        return [name for name in names if name in self.methods]

    def shape(self, model: str = VIT_B, images: int | None = None) -> Shape:
        """A model at its image size, or the one that the command names."""
        name, size, _ = self._given
        name = name or model
        # Two patches of 14 or 16 pixels along each side.
        default = 28 if "patch14" in name else 32
        return Shape(name, size or (default if self.tiny else 224), images or self.batch, self.tiny)

    def plain(self, shape: Shape, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The plain model on the device; a copy, for changing."""
        return copy.deepcopy(_plain(shape.model, shape.image_size, shape.tiny, self.device, dtype))

    def batch_of(self, shape: Shape, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor]:
        """Images and labels on the device."""
        return batch(shape.batch, shape.image_size, CLASSES, dtype, self.device, seed)


@functools.lru_cache(maxsize=2)
def _plain(name: str, image_size: int, tiny: bool, device: torch.device, dtype: torch.dtype) -> nn.Module:
    # Drawing half a billion random numbers takes a CPU longer than a row does.
    with device:
        options = {"embed_dim": 256, "num_heads": 4, "depth": 2} if tiny else {}
        return create_model(name, CLASSES, image_size, **options).to(device, dtype)
