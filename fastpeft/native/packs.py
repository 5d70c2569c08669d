"""Frozen linear layers as the matrix unit reads them, made once and made again when what they were made of changed.

A pack folds the LayerNorm before the layer and the LayerScale behind it in:

    y = gamma * (W (weight * xhat + bias_norm) + b) = W' xhat + b',   W' = gamma W diag(weight)

An in-place change shows in the tensors' versions and addresses. Edits through `.data` do not: `verify` looks at samples
of the values, and `clear` forgets everything. A library that edits weights so says what it has added (`folded`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fastpeft.native.blocked import BLOCK
from fastpeft.native.gemm import Weight, pack
from fastpeft.native.operand import weight_backward, weight_forward

_SAMPLES = 16


@dataclass
class Layer:
    """A frozen linear layer y = row_scale * (W (column_scale * xhat + shift) + b).

    Attributes:
        weight: W, (out, in).
        column_scale: fp32 (in,), or None for ones.
        shift: fp32 (in,), or None for zeros.
        row_scale: fp32 (out,), or None for ones.
        forward: packed for xhat W'^T.
        bias: fp32 (out,), or None.
    """

    weight: Tensor
    column_scale: Tensor | None
    shift: Tensor | None
    row_scale: Tensor | None
    forward: Weight
    bias: Tensor | None
    norm_trained: ClassVar[bool] = False
    _backward: Weight | None = None
    _tails: dict[int, Weight] = field(default_factory=dict)

    def make(self) -> tuple[Weight, Tensor | None]:
        """Packed for xhat W'^T, and the bias."""
        return self.forward, self.bias

    @property
    def backward(self) -> Weight:
        """Packed for dy W'; made when first asked for."""
        if self._backward is None:
            self._backward = pack(self.weight.t(), self.row_scale, self.column_scale)
        return self._backward

    def tail(self, start: int) -> tuple[Weight, Tensor | None, Weight]:
        """The outputs from `start` on, a multiple of 32: packed forward, their bias, packed backward."""
        data = self.forward.data[start // BLOCK :]
        if start not in self._tails:
            row_scale = None if self.row_scale is None else self.row_scale[start:]
            self._tails[start] = pack(self.weight[start:].t(), row_scale, self.column_scale)
        forward = Weight(data, data.shape[0] * BLOCK, self.forward.depth)
        return forward, None if self.bias is None else self.bias[start:], self._tails[start]

    @property
    def bytes(self) -> int:
        """Memory of the packs."""
        packed = (self.forward, self._backward, *self._tails.values())
        return sum(w.data.nbytes for w in packed if w is not None)


def _layer(
    weights: list[Tensor], biases: list[Tensor | None], norm: tuple[Tensor | None, ...], gamma: Tensor | None
) -> Layer:
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    column_scale, shift = (None if t is None else t.float().contiguous() for t in norm)
    row_scale = None if gamma is None else gamma.float().contiguous()
    total = None if biases[0] is None else torch.cat([bias.float() for bias in biases])
    if shift is not None:
        moved = weight.float() @ shift
        total = moved if total is None else total + moved
    if row_scale is not None and total is not None:
        total = total * row_scale
    forward = pack(weight, column_scale, row_scale)
    return Layer(weight, column_scale, shift, row_scale, forward, None if total is None else total.contiguous())


class Live:
    """A layer some of whose tensors are trained: as `Layer`, but what is packed is made when it is asked for, from what
    the tensors hold then, and kept by nobody.

    Attributes:
        norm_trained: the LayerNorm's weight or bias is; `backward` then leaves the weight out, and the gradient is
            that of LayerNorm's output.
    """

    def __init__(
        self,
        weights: list[Tensor],
        biases: list[Tensor | None],
        norm: tuple[Tensor | None, ...],
        gamma: Tensor | None,
        norm_trained: bool,
    ):
        self.weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.column_scale, self.shift = (None if t is None else t.float().contiguous() for t in norm)
        self.row_scale = None if gamma is None else gamma.float().contiguous()
        self._bias = None if biases[0] is None else torch.cat([bias.float() for bias in biases])
        self.norm_trained = norm_trained

    def make(self) -> tuple[Weight, Tensor | None]:
        """Packed for xhat W'^T, and the bias."""
        forward, bias = weight_forward(self.weight, self.column_scale, self.row_scale, self.shift)
        if self._bias is not None:
            bias = self._bias if bias is None else bias + self._bias
        return forward, bias if bias is None or self.row_scale is None else bias * self.row_scale

    @property
    def backward(self) -> Weight:
        """Packed for dy W'."""
        return weight_backward(self.weight, None if self.norm_trained else self.column_scale, self.row_scale)


class Packs:
    """The packs of a block. They are not copied with it, nor saved."""

    def __init__(self) -> None:
        self._layers: dict[str, tuple[tuple, tuple[Tensor | None, ...], Tensor, Layer]] = {}

    def __deepcopy__(self, memo: dict) -> Packs:
        return Packs()

    def __reduce__(self):
        return Packs, ()

    @torch.no_grad()
    def layer(
        self,
        name: str,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        norm: tuple[Tensor | None, Tensor | None],
        gamma: Tensor | None,
        folded: Hashable = (),
    ) -> Layer | Live:
        """The layer of this name, packed anew if any of its tensors is another one than before or was changed.

        One with tensors that are trained is never kept: not every optimizer leaves a trace where it changes them.

        Args:
            name: of the layer in its block.
            weights: (out, in) each, one below the other.
            biases: (out,) each, or None for all.
            norm: weight and bias of the LayerNorm before it, (in,) each or None.
            gamma: (out,), LayerScale behind it, or None.
            folded: what has been added to the weights without a trace in them.
        """
        tensors = (*weights, *biases, *norm, gamma)
        if any(t is not None and t.requires_grad for t in tensors):
            self._layers.pop(name, None)
            plain = tuple(None if t is None else t.detach() for t in norm)
            rest = [[None if t is None else t.detach() for t in each] for each in (weights, biases)]
            trained = any(t is not None and t.requires_grad for t in norm)
            return Live(*rest, plain, None if gamma is None else gamma.detach(), trained)
        key = (folded, *map(_state, tensors))
        found = self._layers.get(name)
        if found is not None and found[0] == key:
            return found[3]
        plain = tuple(None if t is None else t.detach() for t in tensors)
        count = len(weights)
        layer = _layer(plain[:count], plain[count : 2 * count], plain[2 * count : 2 * count + 2], plain[-1])
        self._layers[name] = (key, plain, _sample(plain), layer)
        return layer

    @torch.no_grad()
    def verify(self) -> None:
        """Forget packs whose sources no longer hold what they held; looks at some of their values."""
        for name, (_, sources, sample, _) in list(self._layers.items()):
            if not torch.equal(_sample(sources), sample):
                del self._layers[name]

    def clear(self) -> None:
        """Forget all packs."""
        self._layers.clear()

    @property
    def bytes(self) -> int:
        """Memory of the packs."""
        return sum(layer.bytes for *_, layer in self._layers.values())


def _state(t: Tensor | None) -> tuple | None:
    """What tells a tensor from another one and, unless it was made in inference mode, from itself before a change."""
    if t is None:
        return None
    return t.data_ptr(), None if t.is_inference() else t._version, t.dtype


def _sample(sources: tuple[Tensor | None, ...]) -> Tensor:
    """Some values of every source."""
    parts = []
    for t in sources:
        if t is not None:
            flat = t.reshape(-1)
            parts.append(flat[:: max(1, flat.numel() // _SAMPLES)].float())
    return torch.cat(parts)
