"""Gradients of a branch's own tensors, where they are trained beside or instead of what a method adds.

    dW = (gamma dy)^T a,   db = sum of gamma dy

a is what the layer reads: LayerNorm's output, attention's, the activation's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastpeft.native.operand import column_sums, outer
from fastpeft.native.packs import Live


class Trained(NamedTuple):
    """Which tensors a layer hands over: weights and biases of layers side by side, then its LayerNorm's.

    Attributes:
        sizes: outputs of the layers.
        norm: there is a LayerNorm before them.
    """

    sizes: tuple[int, ...]
    norm: bool

    @property
    def count(self) -> int:
        """Tensors, some of which may be None."""
        return 2 * len(self.sizes) + (2 if self.norm else 0)


def gradients(
    layer: Live,
    trained: Trained,
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    dy: Tensor,
    a: Tensor,
    rows: int,
    statistics: Tensor | None,
    norm_gradients: Tensor | None,
) -> list[Tensor | None]:
    """Gradients of the tensors that a layer hands over, None where they are not needed.

    Args:
        layer: the layer.
        trained: what it hands over.
        tensors: that.
        needed: which gradients are needed.
        dy: of the layer's output, behind its LayerScale; row-major or blocked.
        a: what the layer read, before its LayerNorm.
        rows: of both.
        statistics: of a, if it is normalised.
        norm_gradients: fp32 (2, in), of the LayerNorm's weight and bias.
    """
    count = len(trained.sizes)
    found: list[Tensor | None] = [None] * trained.count
    product = sums = None
    if any(needed[:count]):
        normed = {"statistics": statistics, "scale": layer.column_scale, "shift": layer.shift} if trained.norm else {}
        product, sums = outer(dy, a, rows, tensors[0].dtype, layer.row_scale, **normed)
    elif any(needed[count : 2 * count]):
        sums = column_sums(dy, rows, layer.row_scale)
    start = 0
    for i, size in enumerate(trained.sizes):
        if needed[i]:
            found[i] = product[start : start + size].to(tensors[i].dtype)
        if needed[count + i]:
            found[count + i] = sums[start : start + size].to(tensors[count + i].dtype)
        start += size
    for i in range(2 * count, trained.count):
        if needed[i]:
            found[i] = norm_gradients[i - 2 * count].to(tensors[i].dtype)
    return found
