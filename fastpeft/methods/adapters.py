"""Bottleneck adapters: the VPT paper's, and the serial and parallel ones of the mPLUG study."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fastpeft.engine.extensions import Adapters, Bottleneck, SingleAdapter
from fastpeft.engine.view import BlockView, ModelView
from fastpeft.errors import MethodError
from fastpeft.methods.base import Method, check, is_count, is_number, names

_LOCATIONS = ("attn", "ffn")
# Attention to a memory, which the study leaves open and blocks may not have.
_CROSS = "cross"


@dataclass(frozen=True)
class Adapter(Method):
    """The adapter of the VPT paper: one bottleneck behind each FFN, before its residual is added.

        u = FFN(LN(h)),   y = h + (u + Up(GELU(Down(u))))

    Attributes:
        reduction: the bottleneck has d // reduction units.
        init: "normal": Down random, Up zero. "released": both zero, as in the paper's released code; the gradients of
            both weights and of Down's bias then vanish identically and only Up's bias is ever trained.
    """

    name: ClassVar[str] = "adapter"
    reduction: int = 8
    init: str = "normal"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(is_count(self.reduction), f"Adapter: reduction must be a positive integer, got {self.reduction!r}")
        check(self.init in ("normal", "released"), f"Adapter: init must be 'normal' or 'released', got {self.init!r}")

    def attach(self, model: ModelView) -> None:
        for block in model.blocks:
            dim = block.dim
            check(self.reduction <= dim, f"Adapter: reduction {self.reduction} leaves no unit at width {dim}")
            adapter = SingleAdapter(dim, dim // self.reduction, "gelu", bias=True, skip=True)
            if self.init == "released":
                nn.init.zeros_(adapter.down.weight)
            block.attach(self.name, adapter)


def _check_adapter(method: SerialAdapter | ParallelAdapter) -> None:
    kind = type(method).__name__
    object.__setattr__(method, "locations", names(method.locations))
    check(is_count(method.hidden), f"{kind}: hidden must be a positive integer, got {method.hidden!r}")
    check(
        bool(method.locations) and all(at in (*_LOCATIONS, _CROSS) for at in method.locations),
        f"{kind}: locations must be among {', '.join((*_LOCATIONS, _CROSS))}, got {method.locations!r}",
    )
    check(isinstance(method.bias, bool), f"{kind}: bias must be True or False, got {method.bias!r}")


def _locations(method: SerialAdapter | ParallelAdapter, model: ModelView, block: BlockView) -> list[str]:
    """Those of the method's locations that the block has."""
    if _CROSS in method.locations and not any(other.spec.cross for other in model.blocks):
        raise MethodError(f"{type(method).__name__}: no block attends to a memory, as the location {_CROSS!r} needs")
    return [at for at in method.locations if at != _CROSS or block.spec.cross]


@dataclass(frozen=True)
class SerialAdapter(Method):
    """Adapters behind attention and FFN, before the residual is added (Houlsby et al., 2019; the mPLUG study).

        f = A(sublayer(x)),   A(x) = ReLU(x W_down) W_up + x

    Attributes:
        hidden: bottleneck width.
        bias: biases in both layers; the study's equation has none.
        locations: "attn", "ffn" or both, and "cross" for attention to a memory, in blocks that have it.
    """

    name: ClassVar[str] = "serial_adapter"
    hidden: int = 64
    bias: bool = False
    locations: tuple[str, ...] = _LOCATIONS

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_adapter(self)

    def attach(self, model: ModelView) -> None:
        for block in model.blocks:
            made = {
                at: Bottleneck(block.dim, self.hidden, "relu", self.bias, skip=True)
                for at in _locations(self, model, block)
            }
            block.attach(self.name, Adapters("serial", made))


@dataclass(frozen=True)
class ParallelAdapter(Method):
    """Adapters beside attention and FFN (He et al., 2022; the mPLUG study).

        f = sublayer(h) + scale * ReLU(h W_down) W_up  (+ h with skip)

    h is the sub-layer's input: behind its LayerNorm in pre-norm models.

    Attributes:
        hidden: bottleneck width.
        bias: biases in both layers.
        skip: the adapter's own "+ x" that the study's equation writes. The model then does not start as the identity.
        scale: factor of the adapter.
        locations: "attn", "ffn" or both, and "cross" for attention to a memory, in blocks that have it.
    """

    name: ClassVar[str] = "parallel_adapter"
    hidden: int = 64
    bias: bool = False
    skip: bool = False
    scale: float = 1.0
    locations: tuple[str, ...] = _LOCATIONS

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_adapter(self)
        check(isinstance(self.skip, bool), f"ParallelAdapter: skip must be True or False, got {self.skip!r}")
        check(is_number(self.scale), f"ParallelAdapter: scale must be a finite number, got {self.scale!r}")

    def attach(self, model: ModelView) -> None:
        for block in model.blocks:
            made = {
                at: Bottleneck(block.dim, self.hidden, "relu", self.bias, self.skip, self.scale)
                for at in _locations(self, model, block)
            }
            block.attach(self.name, Adapters("parallel", made))
