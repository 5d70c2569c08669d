"""One operator as a training step calls it, by what the library chooses and in plain PyTorch, with its own products."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from bench.cost.methods import INFERENCE, OURS, PEFT, PHASES, TRAIN, require_peft
from bench.cost.settings import Settings
from bench.device_parts.operators import cases
from bench.device_parts.problems import Problem
from bench.timing import Step

REFERENCE = "reference"
# Of ViT-B/16 at 224 pixels.
_TOKENS, _WIDTH, _HEADS, _HIDDEN, _PROMPTS, _RANK, _BOTTLENECK = 197, 768, 12, 3072, 200, 8, 64

# What a call gets from the layers before it.
_ACTIVATIONS = ("x", "residual", "branch", "q", "k", "v")

# (batch, rows, inner, columns) of the matrix products that a call cannot do without: forward, and backward.
Products = list[tuple[int, int, int, int]]


def call_of(operator: str, images: int) -> dict[str, object]:
    """The sizes of a call, as the operator's `problem` takes them."""
    rows = images * _TOKENS
    return {
        "prompt_attention": {"batch": images, "heads": _HEADS, "tokens": _TOKENS, "prompts": _PROMPTS},
        "layer_norm": {"shape": (images, _TOKENS, _WIDTH), "branch": True},
        "lora_linear": {"rows": rows, "ranks": (_RANK,) * 3},
        "adapter": {"rows": rows, "hidden": _BOTTLENECK},
        "mlp": {"rows": rows},
    }[operator]


def describe(operator: str) -> str:
    """The call in words."""
    return {
        "prompt_attention": f"{_TOKENS} tokens, {_PROMPTS} prompts, {_HEADS} heads",
        "layer_norm": f"with the sum before it, width {_WIDTH}",
        "lora_linear": f"q, k, v of width {_WIDTH}, rank {_RANK}",
        "adapter": f"width {_WIDTH}, {_BOTTLENECK} units, skip connection",
        "mlp": f"width {_WIDTH}, {_HIDDEN} units, GELU, frozen",
    }[operator]


def products(operator: str, images: int) -> tuple[Products, Products]:
    """The matrix products of a call, forward and backward; none of LayerNorm's, which is a matter of memory."""
    rows = images * _TOKENS
    if operator == "prompt_attention":
        keys, dim = _TOKENS + _PROMPTS, _WIDTH // _HEADS
        scores, values = (images * _HEADS, _TOKENS, dim, keys), (images * _HEADS, _TOKENS, keys, dim)
        # dP and P V's counterparts for q, k and v.
        columns = (images * _HEADS, keys, _TOKENS, dim)
        return [scores, values], [scores, values, columns, columns]
    if operator == "layer_norm":
        return [], []
    if operator == "lora_linear":
        return [(1, rows, _WIDTH, 3 * _WIDTH)], [(1, rows, 3 * _WIDTH, _WIDTH)]
    if operator == "adapter":
        down, up = (1, rows, _WIDTH, _BOTTLENECK), (1, rows, _BOTTLENECK, _WIDTH)
        # Gradients of hidden units and input, and of both factors.
        return [down, up], [down, up, (1, _WIDTH, rows, _BOTTLENECK), (1, _BOTTLENECK, rows, _WIDTH)]
    wide, narrow = (1, rows, _WIDTH, _HIDDEN), (1, rows, _HIDDEN, _WIDTH)
    return [wide, narrow], [wide, narrow]


class OperatorSteps:
    """An operator's steps: forward and backward as in training, forward alone as in inference.

    Attributes:
        base: what ratios are to.
        who: all that compute it.
    """

    base = REFERENCE

    def __init__(self, name: str, settings: Settings) -> None:
        """Prepare nothing yet.

        Args:
            name: of the operator.
            settings: of the run.
        """
        self.name, self.settings = name, settings
        self.who = (OURS, REFERENCE, *((PEFT,) if name == "lora_linear" else ()))

    def prepare(self, phase: str, who: str, compiled: bool) -> Step:
        """A call of an implementation.

        Args:
            phase: "train" or "inference".
            who: one of `self.who`.
            compiled: by torch.compile.
        """
        torch.manual_seed(0)
        device = torch.device(self.settings.device)
        module = cases(self.name)
        problem = module.problem(self.settings.torch_dtype, device, **call_of(self.name, self.settings.batch))
        assert phase in PHASES
        return Call(problem, *_implementation(module, problem, who), phase, self.settings, compiled)

    def kept(self, step: Call) -> tuple[Step, object]:
        """The forward pass, and whose tensors do not count: what is frozen or trained, for `saved_bytes`."""
        held = [t for name, t in step.leaves.items() if t is not None and name not in _ACTIVATIONS]
        own = SimpleNamespace(parameters=lambda: [*held, *step.trained], buffers=list)
        return step.forward, own

    def resident(self, step: Call) -> None:
        """There is nothing to forget."""

    def floor(self, phase: str) -> Step | None:
        """The products of a call, or None where there are none."""
        forward, backward = products(self.name, self.settings.batch)
        wanted = forward if phase == INFERENCE else [*forward, *backward]
        if not wanted:
            return None
        pairs = []
        for count, rows, inner, columns in wanted:
            shapes = (
                ((rows, inner), (inner, columns)) if count == 1 else ((count, rows, inner), (count, inner, columns))
            )
            pairs.append([self._random(shape) for shape in shapes])

        def step() -> None:
            for a, b in pairs:
                a @ b

        return torch.no_grad()(step)

    def _random(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, device=self.settings.device).to(self.settings.torch_dtype)

    def trained_percent(self) -> None:
        """Operators train no share of a model."""


class Call:
    """One call after another, with its backward pass in training.

    Attributes:
        leaves: the call's tensors.
        trained: factors of an implementation that has its own.
    """

    def __init__(
        self,
        problem: Problem,
        function: Callable,
        trained: tuple[Tensor, ...],
        phase: str,
        settings: Settings,
        compiled: bool,
    ) -> None:
        self._problem, self._phase, self.trained = problem, phase, trained
        self._function = torch.compile(function, backend=settings.compiler) if compiled else function
        self.leaves = problem.leaves()
        wanted = [name for name in problem.wanted if not trained or name in _ACTIVATIONS]
        self._inputs = [*(self.leaves[name] for name in wanted), *trained]

    def forward(self) -> object:
        """The forward pass."""
        return self._function(self.leaves)

    def __call__(self) -> None:
        """The whole of it."""
        if self._phase == TRAIN:
            outputs = self.forward()
            torch.autograd.grad(outputs, self._inputs, self._problem.gradients_of(outputs))
        else:
            with torch.no_grad():
                self.forward()


def _implementation(module: object, problem: Problem, who: str) -> tuple[Callable, tuple[Tensor, ...]]:
    """An implementation, and what it trains in the place of the problem's own factors."""
    if who == PEFT:
        require_peft()
        rival = module.rivals(problem)[PEFT]
        return rival.function, tuple(rival.parameters)
    backend = "auto" if who == OURS else REFERENCE
    return lambda leaves: problem.call(leaves, backend), ()
