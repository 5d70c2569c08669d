"""One call of an operator on fresh inputs: its results and gradients, by whatever function computes them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.tolerance import CAP, Deviation, bound, relative_error, worst_place

Tensors = Mapping[str, Tensor | None]
Function = Callable[[Tensors], Sequence[Tensor]]
# A tensor this much smaller than the largest of its problem is zero up to rounding.
_NOTHING = 1e-6


@dataclass(frozen=True)
class Work:
    """What has to be done at the least: products, and bytes read and written once each."""

    forward_flops: float
    backward_flops: float
    forward_bytes: float
    backward_bytes: float

    def of(self, phase: str) -> tuple[float, float]:
        """Operations and bytes of "forward", "backward" or "both"."""
        forward, backward = (self.forward_flops, self.forward_bytes), (self.backward_flops, self.backward_bytes)
        if phase == "both":
            return forward[0] + backward[0], forward[1] + backward[1]
        return forward if phase == "forward" else backward


@dataclass
class Problem:
    """Inputs of one call.

    Attributes:
        tensors: by name, in the formats and with the strides of the call.
        wanted: whose gradients are asked for.
        outputs: names of the results.
        call: the public operator, given tensors and a backend.
        work: the least that has to be done.
        exact: what counts as the truth, in float64; the operator's reference if None.
        cap: absolute bound on the relative error; that of the inputs' coarsest format if None.
    """

    tensors: dict[str, Tensor | None]
    wanted: tuple[str, ...]
    outputs: tuple[str, ...]
    call: Callable[[Tensors, str], Sequence[Tensor]]
    work: Work | None = None
    exact: Function | None = None
    cap: float | None = None
    _gradients: list[Tensor] = field(default_factory=list)

    def by(self, backend: str) -> Function:
        """The operator on a backend."""
        return lambda tensors: self.call(tensors, backend)

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
        """The inputs as new leaves of autograd, converted if a format is given."""

        def leaf(name: str, t: Tensor | None) -> Tensor | None:
            if not _floats(t):
                return t
            t = t.detach() if dtype is None else t.detach().to(dtype)
            return t.requires_grad_(name in self.wanted)

        return {name: leaf(name, t) for name, t in self.tensors.items()}

    def gradients_of(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of the outputs, drawn once, in the outputs' format."""
        if not self._gradients:
            like = next(t for t in self.tensors.values() if _floats(t))
            self._gradients = [torch.randn(t.shape, device=t.device).to(like.dtype) for t in outputs]
        return [g.to(t.dtype) for g, t in zip(self._gradients, outputs, strict=True)]

    def results(self, function: Function, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Outputs and gradients, by name."""
        leaves = self.leaves(dtype)
        outputs = function(leaves)
        found = {name: t.detach() for name, t in zip(self.outputs, outputs, strict=True)}
        if self.wanted:
            inputs = [leaves[name] for name in self.wanted]
            gradients = torch.autograd.grad(outputs, inputs, self.gradients_of(outputs))
            found |= {f"d{name}": g for name, g in zip(self.wanted, gradients, strict=True)}
        return found

    def check(self, function: Function) -> Checked:
        """Compare a function with float64, beside plain PyTorch in the inputs' own format; run it twice."""
        exact = self.results(self.exact or self.by("reference"), torch.float64)
        plain = self.results(self.by("reference"))
        with poisoned():
            found = self.results(function)
            again = self.results(function)
        # A gradient of a factor in fp32 is a sum over activations that are not.
        coarsest = max((t.dtype for t in self.leaves().values() if _floats(t)), key=lambda d: torch.finfo(d).eps)
        cap = CAP[coarsest] if self.cap is None else self.cap
        largest = max(float(t.norm()) / max(1, t.numel()) ** 0.5 for t in exact.values())
        deviations = []
        for name, value in found.items():
            count, size = exact[name].numel() ** 0.5, float(exact[name].norm())
            if size <= _NOTHING * count * largest:
                size = count * largest
            baseline = relative_error(plain[name], exact[name], size)
            allowed = bound(baseline, value.dtype, cap)
            error = relative_error(value, exact[name], size)
            deviations.append(Deviation(name, error, baseline, allowed, worst_place(value, exact[name])))
        moving = [name for name, value in found.items() if not torch.equal(value, again[name])]
        return Checked(deviations, moving)


@dataclass(frozen=True)
class Checked:
    """What a comparison found.

    Attributes:
        deviations: one a tensor.
        moving: tensors that came out otherwise when the same call was repeated.
    """

    deviations: list[Deviation]
    moving: list[str]

    @property
    def worst(self) -> Deviation:
        """The tensor nearest to its bound, or farthest beyond."""
        return max(self.deviations, key=lambda d: d.error / d.bound)

    def row(self, deterministic: bool = True) -> dict[str, object]:
        """As a row of results; with `deterministic` a result that moves is a wrong one."""
        wrong = [str(d) for d in self.deviations if not d.passed]
        if deterministic:
            wrong += [f"{name}: differs between two calls on the same inputs" for name in self.moving]
        return {
            "passed": not wrong,
            "tensors": len(self.deviations),
            "relative_error": _number(self.worst.error),
            "plain_error": _number(self.worst.baseline),
            "bound": self.worst.bound,
            "worst": str(self.worst),
            "failed": wrong[:10],
            "moving": self.moving,
        }


def _floats(t: Tensor | None) -> bool:
    return t is not None and t.is_floating_point()


def _number(x: float) -> float | str:
    """As JSON has it, which knows no infinity."""
    return x if abs(x) < float("inf") else str(x)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill memory that torch hands out uninitialised with NaN, so that what was never written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of products that cuBLAS could make reproducible
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = fill


def traffic(*tensors: Tensor | None) -> int:
    """Bytes of the tensors."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
