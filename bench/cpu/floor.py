"""F: the matrix products that a step of a frozen backbone cannot do without, each by torch's fastest way to do it.

These are, for every linear layer of the blocks, y = x W^T and dx = dy W on all token rows. No bias, no allocation where
a way can do without it, the same few activations again and again: a floor that no step by these products gets below.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[[], object]
# A way to multiply: given W as (out, in), it makes x, y -> y = x W^T, with y to write to if it wants to.
Way = Callable[[Tensor], Callable[[Tensor, Tensor], object]]

# The fastest way of a shape is looked for on so many of its weights, so many times.
_TRIED, _TURNS = 4, 5


def _linear(w: Tensor) -> Callable[[Tensor, Tensor], object]:
    return lambda x, y: F.linear(x, w)


def _product(w: Tensor) -> Callable[[Tensor, Tensor], object]:
    return lambda x, y: torch.mm(x, w.t(), out=y)


def _packed(rows: int) -> Way:
    def way(w: Tensor) -> Callable[[Tensor, Tensor], object]:
        packed = torch.ops.mkldnn._reorder_linear_weight(w.contiguous(), rows)
        return lambda x, y: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

    return way


def _ways(rows: int) -> dict[str, Way]:
    """The ways that this build of torch has. A weight is given as it is or transposed, which each reads as it comes."""
    ways: dict[str, Way] = {"linear": _linear, "mm into memory": _product}
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        ways["linear, prepacked"] = _packed(rows)
    return ways


class Floor:
    """A step of nothing but the products.

    Attributes:
        choices: the way taken for each product, by its shape.
        operations: floating-point operations of a call.
    """

    def __init__(self, model: nn.Module, rows: int) -> None:
        """Find the fastest ways.

        Args:
            model: a plain timm vision transformer.
            rows: token rows of a batch.
        """
        with torch.no_grad():
            self._prepare(model, rows)

    def _prepare(self, model: nn.Module, rows: int) -> None:
        weights = [
            module.weight.detach()
            for block in model.blocks
            for part in (block.attn, block.mlp)
            for module in part.modules()
            if isinstance(module, nn.Linear)
        ]
        dtype = weights[0].dtype
        widths = {width for w in weights for width in w.shape}
        self._in = {width: torch.randn(rows, width).to(dtype) for width in widths}
        self._out = {width: torch.empty(rows, width, dtype=dtype) for width in widths}
        self.choices: dict[str, str] = {}
        self.operations = sum(4 * rows * w.numel() for w in weights)
        forward = self._chosen("forward", weights, rows)
        backward = self._chosen("input gradient", [w.t() for w in weights], rows)
        self._products = forward + backward[::-1]

    def _chosen(self, what: str, weights: list[Tensor], rows: int) -> list[tuple[Step, Tensor, Tensor]]:
        """The products with weights (out, in), by the fastest way of each shape."""
        ways = _ways(rows)
        fastest: dict[tuple[int, ...], Way] = {}
        for w in weights:
            if (shape := tuple(w.shape)) not in fastest:
                alike = [other for other in weights if tuple(other.shape) == shape][:_TRIED]
                name = self._fastest({name: [way(v) for v in alike] for name, way in ways.items()}, shape)
                fastest[shape] = ways[name]
                self.choices[f"{what} {shape[1]} -> {shape[0]}"] = name
        return [(fastest[tuple(w.shape)](w), self._in[w.shape[1]], self._out[w.shape[0]]) for w in weights]

    def _fastest(self, made: dict[str, list[Step]], shape: tuple[int, ...]) -> str:
        x, y = self._in[shape[1]], self._out[shape[0]]
        seconds: dict[str, list[float]] = {name: [] for name in made}
        for turn in range(1 + _TURNS):
            for name, products in made.items():
                begin = time.perf_counter()
                for product in products:
                    product(x, y)
                if turn > 0:  # the first call of a shape makes its kernel
                    seconds[name].append(time.perf_counter() - begin)
        return min(seconds, key=lambda name: statistics.median(seconds[name]))

    @torch.no_grad()
    def __call__(self) -> None:
        """Run them all: forward through the blocks, and back."""
        for product, x, y in self._products:
            product(x, y)
