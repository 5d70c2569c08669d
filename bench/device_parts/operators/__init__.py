"""The operators as problems, one module each.

A module offers `checked(tiny)` and `timed(tiny)`, which yield case names with functions of dtype and device that draw a
`Problem`, and `rivals(problem)`: what else computes the same, by name.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

from bench.device_parts.problems import Function, Problem
from bench.device_parts.rows import Unavailable
from fastpeft.ops.choose import chip_of, table, unavailable

INTERPRETED_BFLOAT16 = "Triton's interpreter cannot multiply bf16 matrices"

Builder = Callable[[torch.dtype, torch.device], Problem]
Cases = Iterator[tuple[str, Builder]]


@dataclass(frozen=True)
class Rival:
    """Another way to compute a problem.

    Attributes:
        function: of the problem's tensors.
        parameters: what it trains in the place of the problem's own factors.
        comparable: computes the same function, so that its error can be measured.
        floor: leaves something out, so that nothing can be faster.
    """

    function: Function
    parameters: tuple[Tensor, ...] | None = None
    comparable: bool = True
    floor: bool = False


def cases(operator: str) -> ModuleType:
    """The module of an operator's problems."""
    return importlib.import_module(f"{__name__}.{operator}")


def implementations(operator: str, device: torch.device) -> list[str]:
    """Backends of an operator besides the reference; "triton:fused" where a backend has several variants of itself."""
    found = []
    for owner, backend, _ in table(chip_of(device)):
        # A CPU's kernels are no business of a GPU, nor of its result file.
        if owner == operator and backend not in ("reference", "cpu" if device.type == "cuda" else None):
            found += [f"{backend}:{variant}" for variant in _variants(operator, backend, device)] or [backend]
    return found


def _variants(operator: str, backend: str, device: torch.device) -> tuple[str, ...]:
    if backend != "triton" or unavailable(operator, backend, chip_of(device)):
        return ()
    try:
        return tuple(getattr(importlib.import_module(f"fastpeft.kernels.{operator}"), "VARIANTS", ()))
    except ModuleNotFoundError:
        return ()


def default_variant(operator: str, backend: str, capability: int) -> str | None:
    """The variant of itself that a backend takes on a chip, None where it has no choice."""
    try:
        return getattr(importlib.import_module(f"fastpeft.kernels.{operator}"), "_DEFAULT_VARIANT", {}).get(capability)
    except ModuleNotFoundError:
        return None


def why_not(operator: str, implementation: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why an implementation cannot run here whatever the arguments, or None."""
    backend = implementation.partition(":")[0]
    chip = chip_of(device)
    if chip.interpreted and backend == "triton" and dtype == torch.bfloat16:
        return INTERPRETED_BFLOAT16
    return unavailable(operator, backend, chip)


@contextlib.contextmanager
def as_default(operator: str, implementation: str) -> Iterator[str]:
    """Let the variant be its backend's default; gives the backend's name."""
    backend, _, variant = implementation.partition(":")
    if not variant:
        yield backend
        return
    module = importlib.import_module(f"fastpeft.kernels.{operator}")
    # Public operators do not offer the choice, since a chip's default is what users get.
    defaults = getattr(module, "_DEFAULT_VARIANT", None)
    if defaults is None:
        raise Unavailable(f"{module.__name__} has no table of default variants to change")
    with mock.patch.dict(defaults, dict.fromkeys(defaults, variant)):
        yield backend


def function_of(operator: str, implementation: str, problem: Problem) -> Function:
    """The public operator on an implementation, forward and backward.

    Raises:
        Unavailable: in the call, not here, where the variant cannot be chosen.
    """

    def run(tensors) -> object:
        with as_default(operator, implementation) as backend:
            return problem.call(tensors, backend)

    return run


def each(which: str, operators: Sequence[str], tiny: bool) -> Iterator[tuple[str, str, Builder]]:
    """(operator, case, builder) of the operators: "checked" or "timed"."""
    for operator in operators:
        for name, builder in getattr(cases(operator), which)(tiny):
            yield operator, name, builder
