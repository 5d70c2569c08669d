"""Which implementation of an operator runs.

Every operator has its reference in plain PyTorch, which runs anywhere and is what every other one is tested against.
Besides, an operator may have implementations in modules that offer

    reasons(...) -> list[str]    why it cannot serve these arguments; empty if it can
    forward(...), backward(...)  on tensors, without autograd

`"auto"` takes one of them only where a committed measurement shows that it is right and faster than what it replaces
(`fastpeft.ops.proven`), and the reference otherwise. A name asked for runs, or is an error with every reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType

import torch

from fastpeft import _cuda, _native
from fastpeft.errors import FastPEFTError
from fastpeft.ops.proven import PROVEN

OPERATORS = ("prompt_attention", "layer_norm", "lora_linear", "adapter", "mlp")
# What can be chosen: the operators, a block's branches as wholes, which are the operators' composition otherwise, and a
# language model's loss.
CHOICES = (*OPERATORS, "block", "linear_cross_entropy")
BACKENDS = ("reference", "cpu", "triton", "cuda", "xformers")

# Where an implementation is, what it is made with, and the smallest compute capability it runs on.
_MODULES: dict[tuple[str, str], str] = {
    ("prompt_attention", "triton"): "fastpeft.kernels.prompt_attention",
    ("layer_norm", "triton"): "fastpeft.kernels.layer_norm",
    ("lora_linear", "triton"): "fastpeft.kernels.lora_linear",
    ("adapter", "triton"): "fastpeft.kernels.adapter",
    ("mlp", "triton"): "fastpeft.kernels.mlp",
    ("prompt_attention", "cpu"): "fastpeft.native.vector.prompt_attention",
    ("layer_norm", "cpu"): "fastpeft.native.vector.layer_norm",
    ("mlp", "cpu"): "fastpeft.native.vector.mlp",
    ("adapter", "cpu"): "fastpeft.native.vector.adapter",
    ("prompt_attention", "cuda"): "fastpeft.ops.cuda_attention",
    ("adapter", "cuda"): "fastpeft.ops.cuda_adapter",
    ("prompt_attention", "xformers"): "fastpeft.ops.xformers_attention",
    ("block", "cpu"): "fastpeft.native.block",
    ("linear_cross_entropy", "cpu"): "fastpeft.native.vector.cross_entropy",
}
_PACKAGES = {"triton": "triton", "xformers": "xformers"}
_CAPABILITY = {"triton": 75, "cuda": 80, "xformers": 75}

# The environment's part: one variable for all operators, one for each.
VARIABLE = "FASTPEFT_BACKEND"

_log = logging.getLogger("fastpeft")


class BackendError(FastPEFTError):
    """The backend that was asked for cannot run, or has an unknown name."""


@dataclass(frozen=True)
class Chip:
    """What an implementation is chosen for.

    Attributes:
        kind: "cpu" or "cuda".
        capability: compute capability of a GPU, 90 for sm_90; of a CPU the position of its instruction set in
            `fastpeft._native.LEVELS`.
        interpreted: Triton runs its kernels on the CPU, slowly, for tests.
    """

    kind: str
    capability: int = 0
    interpreted: bool = False


_emulated: ContextVar[Chip | None] = ContextVar("emulated", default=None)


@contextlib.contextmanager
def emulated(chip: Chip) -> Iterator[None]:
    """Choose as if tensors were on this chip: what a machine would do can be tested on another."""
    token = _emulated.set(chip)
    try:
        yield
    finally:
        _emulated.reset(token)


def chip_of(device: torch.device) -> Chip:
    """The chip that a device is, or that is being emulated."""
    return _emulated.get() or _chip(device.type, device.index)


@functools.cache
def _chip(kind: str, index: int | None) -> Chip:
    if kind != "cuda":
        level = list(_native.LEVELS).index(_native.cpu_level()) if kind == "cpu" else 0
        return Chip(kind, level, interpreted=os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"))
    major, minor = torch.cuda.get_device_capability(index)
    return Chip(kind, 10 * major + minor)


def asked(backend: str, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """What is asked for each operator: by its own variable, else by the common one, else by the argument.

    Args:
        backend: one of `BACKENDS` or "auto".
        environment: `os.environ` by default.

    Raises:
        BackendError: a name that is not known.
    """
    environment = os.environ if environment is None else environment
    wishes = {}
    for operator in CHOICES:
        names = (f"{VARIABLE}_{operator.upper()}", VARIABLE)
        source = next((name for name in names if environment.get(name)), "backend")
        wish = environment.get(source, backend)
        if wish not in ("auto", *BACKENDS):
            raise BackendError(f"{source} must be one of auto, {', '.join(BACKENDS)}, got {wish!r}")
        if wish not in ("auto", "reference") and (operator, wish) not in _MODULES:
            # One name for all operators: those that it does not have stay with the reference.
            if source == names[0]:
                raise BackendError(f"{source}: {operator} has no {wish} implementation, only {_offers(operator)}")
            wish = "auto"
        wishes[operator] = wish
    return wishes


def _offers(operator: str) -> str:
    return ", ".join(["reference", *(backend for name, backend in _MODULES if name == operator)])


@functools.cache
def unavailable(operator: str, backend: str, chip: Chip) -> str | None:
    """Why an implementation cannot run on a chip whatever the arguments, or None."""
    if (operator, backend) not in _MODULES:
        return f"there is no {backend} implementation of {operator}"
    if backend == "cpu":
        if chip.kind != "cpu":
            return f"runs on the CPU, the tensors are on {chip.kind}"
        return None if _native.library() is not None else f"the native library is {_native.status()}"
    package = _PACKAGES.get(backend)
    if package is not None and importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if chip.kind != "cuda":
        if backend == "triton" and chip.interpreted:
            return None
        return f"needs an NVIDIA GPU, the tensors are on {chip.kind}"
    if chip.capability < _CAPABILITY[backend]:
        return f"needs compute capability {_CAPABILITY[backend] / 10:.1f}, the GPU has {chip.capability / 10:.1f}"
    return _cuda.unavailable(chip.capability) if backend == "cuda" else None


def is_reference(operator: str, wish: str, device: torch.device | None = None) -> bool:
    """Whether the reference runs whatever the arguments, which is known without looking at them.

    Args:
        operator: name.
        wish: "auto" or one of `BACKENDS`.
        device: of the tensors, if that is known.
    """
    if wish != "auto":
        return wish == "reference"
    if device is None or torch.compiler.is_compiling():
        # What is compiled must not depend on what a chip is found to be while it is traced.
        return not any(name == operator and (device is None or kind == device.type) for name, kind, _ in PROVEN)
    chip = chip_of(device)
    return not PROVEN.get((operator, chip.kind, chip.capability))


def choose(
    operator: str, wish: str, device: torch.device, reasons: Callable[[ModuleType], list[str]]
) -> ModuleType | None:
    """The module that runs an operator, or None for the reference.

    Args:
        operator: name.
        wish: "auto" or one of `BACKENDS`.
        device: of the tensors.
        reasons: asks a module why it cannot serve the arguments at hand.

    Raises:
        BackendError: what was asked for cannot run; names every implementation with its reason.
    """
    if wish == "reference" or (wish == "auto" and transformed()):
        return None
    chip = chip_of(device)
    if wish != "auto":
        refused = _refused(operator, wish, chip, reasons)
        if not refused:
            return _module(operator, wish)
        listed = "; ".join(
            f"{name}: {', '.join(_refused(operator, name, chip, reasons)) or 'could run'}"
            for owner, name in _MODULES
            if owner == operator
        )
        raise BackendError(f"{operator}: {wish} was asked for and cannot run ({listed}); reference always can")
    for backend in PROVEN.get((operator, chip.kind, chip.capability), ()):
        refused = _refused(operator, backend, chip, reasons)
        if not refused:
            return _module(operator, backend)
        say_once(f"{operator} runs on its reference, since {backend} cannot: {', '.join(refused)}")
    return None


def transformed() -> bool:
    """Whether somebody stands between torch's operators and their numbers, who would not see any other operator.

    That is torch.func, forward-mode differentiation, and modes that record, fake or count what torch's operators do.
    """
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return True
    return torch._C._len_torch_dispatch_stack() > 0


def _refused(operator: str, backend: str, chip: Chip, reasons: Callable[[ModuleType], list[str]]) -> list[str]:
    why = unavailable(operator, backend, chip)
    return [why] if why else reasons(_module(operator, backend))


@functools.cache
def _module(operator: str, backend: str) -> ModuleType:
    return importlib.import_module(_MODULES[operator, backend])


@functools.cache
def say_once(message: str) -> None:
    """Log a fallback the first time that it happens."""
    _log.info(message)


def table(chip: Chip) -> list[tuple[str, str, str]]:
    """(operator, backend, what is to be said of it on this chip) of every implementation."""
    rows = []
    for operator in CHOICES:
        rows.append((operator, "reference", "always there"))
        for name, backend in _MODULES:
            if name == operator:
                proven = backend in PROVEN.get((operator, chip.kind, chip.capability), ())
                ready = "chosen by default" if proven else "only when asked for: not measured on this chip yet"
                rows.append((operator, backend, unavailable(operator, backend, chip) or ready))
    return rows
