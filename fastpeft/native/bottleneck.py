"""A bottleneck adapter within a branch, whose hidden units and gradients stay in blocks.

    serial:    y = x + f + A(f),        parallel:  y = x + f + A(xhat'),
    A(a) = scale * (act(a W_down^T + b_down) W_up^T + b_up)

f is what the branch's last layer gives, xhat' the LayerNorm of x. A serial adapter reads f where that layer wrote it; a
parallel one rides along: its hidden units come out of the first layer's product and are further steps of depth of the
last layer's, and their gradient of that of the first layer's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastpeft.native import blocked, one_pass
from fastpeft.native.factors import factors
from fastpeft.native.gemm import DTYPES, Weight, gemm
from fastpeft.native.operand import column_sums, weight_backward, weight_forward
from fastpeft.native.packs import Layer, Live

FACTORS = 4


class Adapter(NamedTuple):
    """What is constant of an adapter: "serial" or "parallel", the name of its activation, the factor of its output."""

    mode: str
    activation: str
    scale: float


def _readable(t: Tensor | None) -> Tensor | None:
    """A factor as products read it."""
    if t is None:
        return None
    t = t.detach()
    return (t if t.dtype in DTYPES else t.float()).contiguous()


class Bottleneck:
    """An adapter in one step of training.

    Attributes:
        serial: it stands behind the branch, not beside it.
        slopes: derivatives of the activation, blocked; there after `hidden` if they were asked for.
    """

    def __init__(self, adapter: Adapter, factors: Sequence[Tensor | None], first: Layer | Live):
        """An adapter of W_down (hidden, d), b_down, W_up (out, hidden), b_up; the LayerNorm is in `first`."""
        self._adapter, self._first = adapter, first
        self._factors = factors
        self._down, self._down_bias, self._up, self._up_bias = map(_readable, factors)
        self.serial = adapter.mode == "serial"
        self._width = blocked.blocks(self._down.shape[0]) * blocked.BLOCK

    @property
    def _up_filled(self) -> Tensor:
        return torch.nn.functional.pad(self._up, (0, self._width - self._up.shape[1]))

    @property
    def _column_scale(self) -> Tensor | None:
        return None if self.serial else self._first.column_scale

    @property
    def _shift(self) -> Tensor | None:
        return None if self.serial else self._first.shift

    def _scales(self, count: int) -> Tensor | None:
        scale = self._adapter.scale
        return None if scale == 1.0 else torch.full((count,), scale)

    def _bias(self) -> Tensor | None:
        """Of the hidden units, with the LayerNorm's shift."""
        bias = self._down_bias
        bias = None if bias is None else bias.float()
        if self._shift is not None:
            moved = self._down.float() @ self._shift
            bias = moved if bias is None else bias + moved
        return None if bias is None else torch.nn.functional.pad(bias, (0, self._width - len(bias)))

    @property
    def _one_pass(self) -> bool:
        return one_pass.fits(self._down.shape[1], self._width)

    def beside(self, rows: int, keep: bool) -> tuple[Tensor, Tensor | None, dict]:
        """A parallel adapter's h = act(xhat' W_down^T + b_down), blocked; the derivative, to be kept; what `gemm` is to
        be told so that it fills both when it multiplies the same xhat."""
        h = blocked.empty(rows, self._width)
        slopes = blocked.empty(rows, self._width) if keep else None
        weight, _ = weight_forward(self._down, self._column_scale, None)
        options = {"a2": h, "down": weight, "down_bias": self._bias()}
        return h, slopes, options | {"down_activation": self._adapter.activation, "down_slopes": slopes}

    def behind(self, f: Tensor, other: Tensor | None, y: Tensor, rows: int, keep: bool) -> tuple[Tensor, Tensor | None]:
        """y = other + f + A(f); h = act(f W_down^T + b_down), and the activation's derivative if it is to be kept.

        Args:
            f: blocked.
            other: like y, or None.
            y: (rows, d), written.
            rows: of these.
            keep: the derivative is needed.
        """
        weight, _ = weight_forward(self._down, None, None)
        bias, activation = self._bias(), self._adapter.activation
        if self._one_pass:
            return one_pass.forward(f, weight, bias, activation, self.up(), self.up_bias(), other, y, rows, keep)
        h = blocked.empty(rows, self._width)
        slopes = blocked.empty(rows, self._width) if keep else None
        gemm(f, weight, h, rows, bias, activation=activation, kept=slopes)
        gemm(h, self.up(), y, rows, self.up_bias(), other=f, another=other)
        return h, slopes

    def up(self) -> Weight:
        """Packed for h W_up^T."""
        return weight_forward(self._up_filled, None, self._scales(self._up.shape[0]))[0]

    def up_bias(self) -> Tensor | None:
        """scale * b_up."""
        return None if self._up_bias is None else self._up_bias.float() * self._adapter.scale

    def backward_input(self) -> Weight:
        """Packed for dz W_down."""
        return weight_backward(self._down, self._column_scale, None)

    def backward(
        self,
        dy: Tensor,
        a: Tensor,
        h: Tensor,
        slopes: Tensor,
        rows: int,
        statistics: Tensor | None,
        needed: Sequence[bool],
        input_too: bool,
    ) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
        """The gradient of the activation's input, blocked; of f, if asked for; and of the four factors.

        Args:
            dy: gradient of the branch.
            a: f, or x.
            h: blocked.
            slopes: blocked.
            rows: of all of these.
            statistics: of x for a parallel adapter.
            needed: which of the factors.
            input_too: dy + dz W_down is wanted, of a serial adapter.
        """
        scale, hidden = self._adapter.scale, self._down.shape[0]
        needs_down, needs_down_bias, needs_up, needs_up_bias = needed
        up_weight = weight_backward(self._up_filled, None, self._scales(self._up.shape[0]))
        down_weight = self.backward_input() if input_too else None
        if self._one_pass:
            dz, df, down, up = one_pass.backward(
                dy, a, h, slopes, up_weight, down_weight, rows, statistics, (needs_down, needs_up)
            )
        else:
            dz = gemm(dy, up_weight, blocked.empty(rows, self._width), rows, kept=slopes)
            df = None
            if input_too:
                df = gemm(dz, down_weight, blocked.empty(rows, dy.shape[1]), rows, other=dy)
            down = factors(dz, a, rows, statistics) if needs_down else None
            up = factors(h, dy, rows) if needs_up else None
        sums = None
        if needs_down_bias or (needs_down and self._shift is not None):
            sums = column_sums(dz, rows)
        if needs_down:
            if self._column_scale is not None:
                down *= self._column_scale
            if self._shift is not None:
                down += sums[:, None] * self._shift
            down = down[:hidden]
        if needs_up:
            up = up[:hidden].t() * scale
        up_bias = column_sums(dy, rows) * scale if needs_up_bias else None
        found = (down, sums[:hidden] if needs_down_bias else None, up, up_bias)
        return dz, df, [None if g is None else g.to(t.dtype) for g, t in zip(found, self._factors, strict=True)]
