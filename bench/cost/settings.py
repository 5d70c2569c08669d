"""On what the cost table is measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.tables.errors import TableError
from bench.timing import device_name
from fastpeft import _native

CLASSES = 100
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# As in `bench.device`, where a GPU is large enough for the paper's batch. Where a step of four images takes seconds,
# the whole table would take more than an hour; BatchNorm of a head needs two.
_BATCH = {"cuda": 64, "amx": 4}
_SLOW_BATCH = 2


@dataclass(frozen=True)
class Settings:
    """A run's.

    Attributes:
        model: timm name of a vision transformer.
        image_size: pixels; the model's own if 0.
        batch: images of a step, and of an operator's call.
        dtype: key of `DTYPES`.
        device: "cpu" or "cuda".
        threads: of torch on the CPU.
        turns: timed steps of each variant at the most.
        seconds: after which no further round of a group begins; three are timed at least.
        compiler: backend of torch.compile.
    """

    model: str = "vit_base_patch16_224"
    image_size: int = 0
    batch: int = 4
    dtype: str = "fp32"
    device: str = "cpu"
    threads: int = 1
    turns: int = 10
    seconds: float = 4.0
    compiler: str = "inductor"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise TableError(f"no number format '{self.dtype}'; there are {', '.join(DTYPES)}")
        for name in ("batch", "turns", "threads"):
            if getattr(self, name) < 1:
                raise TableError(f"{name} must be at least 1, not {getattr(self, name)}")

    @classmethod
    def usual(cls, device: str, **given: object) -> Settings:
        """What is usual on a device, but for what is given and not None."""
        kind = "cuda" if torch.device(device).type == "cuda" else _native.cpu_level()
        usual: dict[str, object] = {
            "device": device,
            "batch": _BATCH.get(kind, _SLOW_BATCH),
            "dtype": "bf16" if kind in _BATCH else "fp32",
            "threads": torch.get_num_threads(),
        }
        return cls(**usual | {name: value for name, value in given.items() if value is not None})

    @property
    def cuda(self) -> bool:
        """Whether the device is an NVIDIA GPU."""
        return torch.device(self.device).type == "cuda"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The number format."""
        return DTYPES[self.dtype]

    def described(self, compiled: bool) -> dict[str, object]:
        """What two figures have to have in common to be compared."""
        about: dict[str, object] = {"model": self.model, "image_size": self.image_size, "batch": self.batch}
        about |= {"dtype": self.dtype, "device": device_name(self.device)}
        if compiled:
            about["compiler"] = self.compiler
        return about if self.cuda else about | {"threads": self.threads}
