"""F: the matrix products that a step of a frozen backbone cannot do without, each by torch's fastest way to do it.

These are, for every linear layer of the blocks, y = x W^T and dx = dy W on all token rows. No bias, no allocation where
a way can do without it, the same few activations again and again: a floor that no step by these products gets below.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

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


def _ways(rows: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Way]:
    """The ways that this build of torch has for a number format on this chip.

    A weight is given as it is or transposed, which each reads as it comes.
    """
    if torch.device(device).type == "cuda":
        return {"mm into memory": _product}  # the others end in the same kernels, and a clock here would not see them
    ways: dict[str, Way] = {"linear": _linear, "mm into memory": _product}
    if _packs(dtype):
        ways["linear, prepacked"] = _packed(rows)
    return ways


def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs a weight of this number format; of bf16 only where the CPU multiplies it."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(16, 16, dtype=dtype), 16)
    except RuntimeError:
        return False
    return True


class Product(NamedTuple):
    """A product with a weight.

    Attributes:
        weight: (out, in).
        rows: of what is multiplied.
        back: the input's gradient is a product too.
    """

    weight: Tensor
    rows: int
    back: bool = True


class Products:
    """A call runs nothing but products: forward in their order, and back for those whose input has a gradient.

    Attributes:
        choices: the way taken for each product, by its shape.
        operations: floating-point operations of a call.
    """

    @torch.no_grad()
    def __init__(self, products: Sequence[Product]) -> None:
        """Find the fastest ways.

        Args:
            products: of one number format, on one device.
        """
        products = [Product(weight.detach(), rows, back) for weight, rows, back in products]
        dtype, device = products[0].weight.dtype, products[0].weight.device
        shapes = {(rows, width) for weight, rows, _ in products for width in weight.shape}
        self._in = {shape: torch.randn(shape, device=device).to(dtype) for shape in shapes}
        self._out = {shape: torch.empty(shape, dtype=dtype, device=device) for shape in shapes}
        self.choices: dict[str, str] = {}
        self.operations = sum(2 * rows * weight.numel() * (2 if back else 1) for weight, rows, back in products)
        # Rows are a part of the name where there are several.
        self._one = len({rows for _, rows, _ in products}) == 1
        forward = self._chosen("forward", [(weight, rows) for weight, rows, _ in products])
        backward = self._chosen("input gradient", [(weight.t(), rows) for weight, rows, back in products if back])
        self._products = forward + backward[::-1]

    def _chosen(self, what: str, products: list[tuple[Tensor, int]]) -> list[tuple[Step, Tensor, Tensor]]:
        """The products with weights (out, in), by the fastest way of each shape."""
        fastest: dict[tuple[int, ...], Way] = {}
        found = []
        for w, rows in products:
            shape = (rows, *w.shape)
            if shape not in fastest:
                ways = _ways(rows, w.device, w.dtype)
                alike = [other for other, count in products if (count, *other.shape) == shape][:_TRIED]
                name = self._fastest({name: [way(v) for v in alike] for name, way in ways.items()}, shape)
                fastest[shape] = ways[name]
                said = "" if self._one else f", {rows} rows"
                self.choices[f"{what} {shape[2]} -> {shape[1]}{said}"] = name
            found.append((fastest[shape](w), self._in[rows, w.shape[1]], self._out[rows, w.shape[0]]))
        return found

    def _fastest(self, made: dict[str, list[Step]], shape: tuple[int, ...]) -> str:
        """The name of the fastest way for (rows, out, in)."""
        if len(made) == 1:
            return next(iter(made))
        x, y = self._in[shape[0], shape[2]], self._out[shape[0], shape[1]]
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


class Floor(Products):
    """The products of the blocks of a vision transformer.

    Args:
        model: a plain timm vision transformer.
        rows: token rows of a batch.
    """

    def __init__(self, model: nn.Module, rows: int) -> None:
        super().__init__(
            [
                Product(module.weight, rows)
                for block in model.blocks
                for part in (block.attn, block.mlp)
                for module in part.modules()
                if isinstance(module, nn.Linear)
            ]
        )
