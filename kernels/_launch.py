"""Launching a kernel, or writing down what would be launched.

Launchers choose block sizes, warps and stages by the shape's class and the chip's compute capability. On tensors of the
`meta` device inside `recording` nothing runs: the launches are listed, so that exactly what a chip would get can be
compiled and looked at on a machine without one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """One kernel with what it is called with.

    Attributes:
        kernel: the `triton.jit` function.
        grid: programs along each axis.
        arguments: by parameter name, constants too.
        num_warps: warps a program.
        num_stages: stages of the software pipeline.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        """The kernel's own name."""
        return self.kernel.__name__


@dataclass
class Recording:
    """What `recording` was asked for, and the launches so far."""

    capability: int
    candidates: bool
    launches: list[Launch]


_recording: ContextVar[Recording | None] = ContextVar("recording", default=None)


@contextlib.contextmanager
def recording(capability: int, candidates: bool = False) -> Iterator[list[Launch]]:
    """List launches instead of running them.

    Args:
        capability: of the chip to choose for, 90 for sm_90.
        candidates: list what tuning would measure besides the tables' choices, too.
    """
    state = Recording(capability, candidates, [])
    token = _recording.set(state)
    try:
        yield state.launches
    finally:
        _recording.reset(token)


def recorder() -> Recording | None:
    """The innermost `recording` that is under way."""
    return _recording.get()


def capability_of(device: torch.device) -> int:
    """Compute capability that launches are chosen for: 90 for sm_90; 80 where there is no GPU (the interpreter)."""
    state = _recording.get()
    if state is not None:
        return state.capability
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def processors_of(device: torch.device) -> int:
    """Streaming multiprocessors of the device; a few where there is no GPU, so that splitting is exercised."""
    if device.type != "cuda":
        return 4 if _recording.get() is None else 128
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], num_warps: int, num_stages: int) -> None:
    """Run a kernel on the device of its tensors, or list it while recording. An empty grid does nothing."""
    if 0 in grid:
        return
    state = _recording.get()
    if state is not None:
        state.launches.append(Launch(kernel, grid, dict(arguments), num_warps, num_stages))
        return
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)
