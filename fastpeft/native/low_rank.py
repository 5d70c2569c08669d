"""Low-rank terms of a packed layer: they ride along its product as a few more steps of depth.

    y += row_scale * scale * B (A (column_scale * xhat + shift))

All terms of a layer are one pair of factors, filled up with zeros: A (width, in), B (out, width), width a multiple of
32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastpeft.native import blocked
from fastpeft.native.factors import factors
from fastpeft.native.gemm import Weight, gemm
from fastpeft.native.operand import weight_backward, weight_forward
from fastpeft.native.packs import Layer, Live


class Place(NamedTuple):
    """What is constant of a term: the output columns that it adds to, and its factor."""

    start: int
    stop: int
    scale: float


class LowRank:
    """The terms of a layer, in one step of training.

    Attributes:
        width: columns of u = A (...), a multiple of 32.
    """

    def __init__(self, layer: Layer | Live, terms: Sequence[tuple[Tensor, Tensor]], places: Sequence[Place]):
        self._layer, self._terms, self._places = layer, terms, places
        self.width = blocked.blocks(sum(a.shape[0] for a, _ in terms)) * blocked.BLOCK
        self._a = torch.zeros(self.width, layer.weight.shape[1])
        self._b = torch.zeros(layer.weight.shape[0], self.width)
        row = 0
        for (a, b), place in zip(terms, places, strict=True):
            self._a[row : row + a.shape[0]] = a
            self._b[place.start : place.stop, row : row + a.shape[0]] = b * place.scale
            row += a.shape[0]

    def forward(self) -> dict[str, Tensor | Weight | None]:
        """What `gemm` is to be told besides, u's memory under "a2"."""
        layer = self._layer
        return {
            "down": weight_forward(self._a, layer.column_scale, None)[0],
            "down_bias": None if layer.shift is None else self._a @ layer.shift,
            "extra": weight_forward(self._b, None, layer.row_scale)[0],
        }

    def backward(self) -> dict[str, Tensor | Weight]:
        """The same for the gradient of the input; du's memory under "a2"."""
        layer = self._layer
        return {
            "down": weight_backward(self._b, None, layer.row_scale),
            "extra": weight_backward(self._a, layer.column_scale, None),
        }

    def gradients(
        self,
        x: Tensor,
        u: Tensor,
        dy: Tensor,
        du: Tensor,
        rows: int,
        statistics: Tensor | None,
        needed: Sequence[tuple[bool, bool]],
    ) -> list[Tensor | None]:
        """dA and dB of every term, in the order of the terms.

        Args:
            x: the layer's input, before its normalisation.
            u: blocked.
            dy: gradient of the output without row_scale.
            du: blocked.
            rows: of all of these.
            statistics: of x, if it is normalised.
            needed: which of A and B, for each term.
        """
        layer = self._layer
        da = factors(du, x, rows, statistics) if any(a for a, _ in needed) else None
        if da is not None and layer.column_scale is not None:
            da *= layer.column_scale
        if da is not None and layer.shift is not None:
            sums = blocked.to_rows(du, rows).sum(0, dtype=torch.float32)
            da += sums[:, None] * layer.shift
        db = factors(u, dy, rows) if any(b for _, b in needed) else None
        if db is not None and layer.row_scale is not None:
            db *= layer.row_scale
        found: list[Tensor | None] = []
        row = 0
        for (a, b), place, (needs_a, needs_b) in zip(self._terms, self._places, needed, strict=True):
            mine = slice(row, row + a.shape[0])
            found.append(da[mine].to(a.dtype) if needs_a else None)
            found.append((db[mine, place.start : place.stop].t() * place.scale).to(b.dtype) if needs_b else None)
            row += a.shape[0]
        return found


def forward(
    layer: Layer | Live, low: LowRank | None, a: Tensor, c: Tensor, rows: int, bias: Tensor | None = None, **options
) -> Tensor | None:
    """c = epilogue(layer(a) + bias) with its terms; returns u, blocked, or None without terms. Options as of `gemm`."""
    u = None
    if low is not None:
        u = blocked.empty(rows, low.width)
        options |= low.forward() | {"a2": u}
    weight, own = layer.make()
    if bias is not None:
        own = bias if own is None else own + bias
    gemm(a, weight, c, rows, own, **options)
    return u


def backward(
    layer: Layer | Live, low: LowRank | None, dy: Tensor, dx: Tensor | None, rows: int, **options
) -> Tensor | None:
    """dx = the gradient of the layer's input (no less if dx is None); returns du, blocked, or None without terms."""
    extra = None if low is None else low.backward()
    du = None if low is None else blocked.empty(rows, low.width)
    if dx is not None:
        gemm(dy, layer.backward, dx, rows, **options, **({} if extra is None else extra | {"a2": du}))
    elif extra is not None:
        gemm(dy, extra["down"], du, rows)
    return du
