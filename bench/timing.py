"""Times as ratios inside one run: variants take turns, and the unavoidable matrix products run beside them.

A clock speed or a noisy neighbour that changes during a run changes all variants alike, because they alternate. The
floor tells how much of a training step could be saved at all.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

Step = Callable[[], object]

_PACKAGES = (
    "torch",
    "timm",
    "transformers",
    "peft",
    "triton",
    "deepspeed",
    "numpy",
    "xformers",
    "liger-kernel",
    "nvidia-cudnn-cu13",
)


@dataclass(frozen=True)
class Timing:
    """Seconds of one variant: median and spread over its turns."""

    median: float
    p20: float
    p80: float
    turns: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Summarise the turns of one variant."""
        ordered = sorted(seconds)
        last = len(ordered) - 1
        p20, p80 = (ordered[round(share * last)] for share in (0.2, 0.8))
        return cls(statistics.median(ordered), p20, p80, len(ordered))

    def to_dict(self, per: int = 1) -> dict[str, float]:
        """Return milliseconds, divided by `per` (a batch size, for milliseconds an image)."""
        scale = 1000.0 / per
        return {
            "median_ms": self.median * scale,
            "p20_ms": self.p20 * scale,
            "p80_ms": self.p80 * scale,
            "turns": self.turns,
        }


def interleave(
    variants: Mapping[str, Step],
    *,
    device: torch.device | str = "cpu",
    turns: int = 20,
    warmup: int = 2,
    budget: float = float("inf"),
    on_turn: Callable[[int], None] | None = None,
) -> dict[str, Timing]:
    """Time variants in turns, A B D C, B C A D, C D B A, D A C B, ..., so that none always follows the same one.

    Args:
        variants: What to time, by name; each call is one step.
        device: Where the steps run; a CUDA device is synchronised around each step.
        turns: Turns of each variant.
        warmup: Untimed calls of each variant before the first turn.
        budget: Seconds after which no further round starts; at least three rounds are timed.
        on_turn: Called after each round with the number of rounds done, for a progress bar.
    """
    device = torch.device(device)
    for step in variants.values():
        for _ in range(warmup):
            step()
    _synchronise(device)

    names = list(variants)
    orders = _orders(len(names))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    for turn in range(turns):
        if turn >= 3 and time.perf_counter() - started > budget:
            break
        for name in (names[number] for number in orders[turn % len(orders)]):
            _synchronise(device)
            begin = time.perf_counter()
            variants[name]()
            _synchronise(device)
            seconds[name].append(time.perf_counter() - begin)
        if on_turn is not None:
            on_turn(turn + 1)
    return {name: Timing.of(values) for name, values in seconds.items()}


def _orders(count: int) -> list[list[int]]:
    """Orders of numbers in which each follows each other one equally often (E. J. Williams, 1949)."""
    zigzag = [(place + 1) // 2 if place % 2 else -place // 2 for place in range(count)]
    orders = [[(number + shift) % count for number in zigzag] for shift in range(count)]
    return orders if count % 2 == 0 else [order for each in orders for order in (each, each[::-1])]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Products of a linear layer: its weight, and whether the input's and the weight's gradients are computed.
_Product = tuple[torch.Tensor, bool, bool]


def floor(model: nn.Module, rows: int, dtype: torch.dtype | None = None) -> Step:
    """Return a step that runs only the unavoidable matrix products of a training step of a vision transformer.

    These are, for every linear layer of the backbone's blocks, the forward product; the input-gradient product from the
    first block with a trainable parameter on; and the weight-gradient product where the weight is trained. All token
    rows count in all blocks: a step that skips rows nobody reads may run below this floor.

    Args:
        model: A timm vision transformer with `requires_grad` set as in training, plain or literal.
        rows: Token rows of a batch, images times tokens of an image (prompts not counted).
        dtype: Type of the products, where autocast makes it another than the weights'.
    """
    products = [(weight.detach().to(dtype or weight.dtype), *needed) for weight, *needed in _products(model)]
    buffers: dict[int, torch.Tensor] = {}
    for weight, _, _ in products:
        for width in weight.shape:
            if width not in buffers:
                buffers[width] = torch.randn(rows, width, dtype=weight.dtype, device=weight.device)

    def step() -> None:
        for weight, _, _ in products:
            buffers[weight.shape[1]] @ weight.T
        for weight, needs_input, needs_weight in reversed(products):
            if needs_weight:
                buffers[weight.shape[0]].T @ buffers[weight.shape[1]]
            if needs_input:
                buffers[weight.shape[0]] @ weight

    return torch.no_grad()(step)


def floor_operations(model: nn.Module, rows: int) -> int:
    """Return the floating-point operations of `floor`."""
    return sum(2 * rows * weight.numel() * (1 + sum(needed)) for weight, *needed in _products(model))


def _products(model: nn.Module) -> list[_Product]:
    products = []
    later = ("blocks.", "norm.", "fc_norm.", "attn_pool.", "head")
    gradient = any(p.requires_grad for name, p in model.named_parameters() if not name.startswith(later))
    for block in model.blocks:
        gradient = gradient or any(p.requires_grad for p in block.parameters())
        for part in (block.attn, block.mlp):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    products.append((module.weight, gradient, module.weight.requires_grad))
    return products


def _anywhere(argument: str) -> str:
    """An argument without the folders of one machine: of an absolute path its last name."""
    return re.sub(r"(^|[=@])/\S*/", r"\1", argument)


def environment(device: torch.device | str = "cpu") -> dict[str, object]:
    """Describe the machine, the versions, the command and the date of a run, for a result file."""
    device = torch.device(device)
    described: dict[str, object] = {
        "device": device_name(device),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "commit": _git("rev-parse", "HEAD"),
        "command": " ".join(["python", *map(_anywhere, sys.orig_argv[1:])]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["capability"] = f"{properties.major}.{properties.minor}"
        described["device_memory_gib"] = round(properties.total_memory / 2**30, 1)
        described["cuda"] = torch.version.cuda
        described["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return described


def device_name(device: torch.device | str) -> str:
    """Return what the device calls itself."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    return _output("git", "-C", str(Path(__file__).parent), *arguments)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None
