"""F of an mPLUG step: the matrix products that it cannot do without, on the shapes that the literal model has.

    F = sum over frozen linear layers W (out, in), at every call with x (rows, in), of
        time(y = x W^T), and time(dx = dy W) where x has a gradient;   2 rows in out operations each

Calls are found by running the literal step once, and count as often as the step makes them: queries, keys, values and
output of every attention, keys and values of the memory in every cross-attention (once an answer, since VQA's memory
is repeated for each), both layers of every feed-forward part, the head's transform and the vocabulary's matrix on the
tokens that are predicted; with images given also the tower's blocks, forward alone. Prompts and prefixes are among the
rows, as the literal model has them. What a method trains is not in F, nor are the two products inside of attention, the
patches' projection and embeddings. Each product is done in the fastest of torch's ways (`bench.cpu.floor`).

F is a price, not a bound: who finds other products for the same result goes below it. With few queries, keys and values
of a memory need not be made.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from bench.cpu.floor import Product, Products
from bench.mplug_cost.steps import MPlugStep


class _Watch(TorchFunctionMode):
    """Notes the products with frozen weights."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Product] = []

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is F.linear:
            x, weight = args[:2]
            # What is made of a trained tensor has a gradient too.
            if not weight.requires_grad:
                back = x.requires_grad and torch.is_grad_enabled()
                self.products.append(Product(weight.detach(), x.numel() // x.shape[-1], back))
        return function(*args, **(kwargs or {}))


def products_of(literal: MPlugStep) -> list[Product]:
    """The products of a literal step with frozen weights, in their order."""
    with _Watch() as watch:
        literal.forward()
    return watch.products


def floor_of(literal: MPlugStep) -> Products:
    """A step of nothing but those."""
    return Products(products_of(literal))
