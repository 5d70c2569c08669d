"""Visual Prompt Tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastpeft.engine.extensions import Prompts
from fastpeft.engine.view import BlockView, ModelView
from fastpeft.errors import MethodError
from fastpeft.methods.base import Method, check, is_count, is_probability, names

_INITS = ("uniform", "normal", "zero")
_FILE = ".safetensors"


@dataclass(frozen=True)
class VPT(Method):
    """Visual Prompt Tuning (Jia et al., ECCV 2022).

    Deep, block i = 1..N:      [x_i, _, E_i] = L_i([x_{i-1}, P_{i-1}, E_{i-1}])
    Shallow:                   [x_1, Z_1, E_1] = L_1([x_0, P, E_0]),  [x_i, Z_i, E_i] = L_i([x_{i-1}, Z_{i-1}, E_{i-1}])

    Prompts start uniform on [-v, v] with v = sqrt(6 / (3 s^2 + d)) for patches of s x s.

    Attributes:
        length: number of prompts p.
        deep: new prompts in every block; otherwise only in the first, whose outputs are carried on.
        dropout: on the prompts, at every insertion. None: 0.1 if deep and trained, else 0.
        dropout_mask: "sample" draws a mask for every image, as the paper does; "batch" one for all, and prompts are
            then projected once a batch.
        depth: (i, j), counted from 1: prompts enter blocks i..j only. The outputs of block j's prompts are carried on.
        share: None, "intra" (one vector repeated within a block), "inter" (the same prompts in all blocks), "all".
        init: "uniform" (the paper's), "normal" (std 0.02), "zero", a tensor (p, d) or (blocks, p, d), or the path of a
            .safetensors file that holds such a tensor as "prompts".
        trained: False leaves the prompts as they start; they are then never dropped out.
    """

    name: ClassVar[str] = "vpt"
    length: int
    deep: bool = True
    dropout: float | None = None
    dropout_mask: str = "sample"
    depth: tuple[int, int] | None = None
    share: str | None = None
    init: str | Tensor = "uniform"
    trained: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check(is_count(self.length), f"VPT: length must be a positive integer, got {self.length!r}")
        check(isinstance(self.deep, bool), f"VPT: deep must be True or False, got {self.deep!r}")
        check(
            self.dropout is None or is_probability(self.dropout),
            f"VPT: dropout must be in [0, 1) or None, got {self.dropout!r}",
        )
        check(
            self.dropout_mask in ("sample", "batch"),
            f"VPT: dropout_mask must be 'sample' or 'batch', got {self.dropout_mask!r}",
        )
        check(
            self.share in (None, "intra", "inter", "all"),
            f"VPT: share must be None, 'intra', 'inter' or 'all', got {self.share!r}",
        )
        check(
            isinstance(self.init, Tensor) or self.init in _INITS or _is_file(self.init),
            f"VPT: init must be one of {', '.join(_INITS)}, a tensor or a {_FILE} file, got {self.init!r}",
        )
        check(isinstance(self.trained, bool), f"VPT: trained must be True or False, got {self.trained!r}")
        check(
            self.trained or not self.dropout, f"VPT: prompts that are not trained need dropout 0, got {self.dropout!r}"
        )
        if self.depth is not None:
            object.__setattr__(self, "depth", names(self.depth))
            check(
                len(self.depth) == 2 and is_count(self.depth[0]) and is_count(self.depth[1], self.depth[0]),
                f"VPT: depth must be (i, j) with 1 <= i <= j, got {self.depth!r}",
            )
            check(self.deep, "VPT: depth is for deep prompts; deep=False already means depth (1, 1)")

    @property
    def drop(self) -> float:
        """The dropout probability in force."""
        return (0.1 if self.deep and self.trained else 0.0) if self.dropout is None else float(self.dropout)

    def blocks(self, count: int) -> range:
        """Positions, from 0, of the blocks that prompts enter in a model of `count` blocks."""
        first, last = (self.depth or (1, count)) if self.deep else (1, 1)
        if last > count:
            raise MethodError(f"VPT: depth {self.depth} reaches beyond the model's {count} blocks")
        return range(first - 1, last)

    def attach(self, model: ModelView) -> None:
        where = self.blocks(len(model.blocks))
        rows = 1 if self.share in ("intra", "all") else self.length
        shared: nn.Parameter | None = None
        given = _read(self.init) if _is_file(self.init) else self.init
        for order, index in enumerate(where):
            block = model.blocks[index]
            prompts = shared
            if prompts is None:
                start = self._start(model.patch_area, block, rows, order, len(where), given)
                prompts = nn.Parameter(start, requires_grad=self.trained)
            if self.share in ("inter", "all"):
                shared = prompts
            check(
                prompts.shape[-1] == block.dim,
                f"VPT: share={self.share!r} needs blocks of one width, but {block.path} has {block.dim} after "
                f"{prompts.shape[-1]}",
            )
            block.attach(self.name, Prompts(prompts, self.length, self.drop, self.dropout_mask == "sample"))
        model.carry(where[-1], len(model.blocks) - 1, self.length)

    def to_dict(self) -> dict[str, Any]:
        # A saved adapter holds the trained values; the file they started from need not be there any more.
        return super().to_dict() | ({"init": "zero"} if _is_file(self.init) else {})

    def _start(
        self, patch_area: int, block: BlockView, rows: int, order: int, count: int, init: str | Tensor
    ) -> Tensor:
        dim = block.dim
        if isinstance(init, Tensor):
            value = init[order] if init.dim() == 3 and len(init) == count else init
            check(
                tuple(value.shape) == (rows, dim),
                f"VPT: init has shape {tuple(init.shape)}, expected ({rows}, {dim}) or ({count}, {rows}, {dim})",
            )
            return value.detach().clone().to(block.dtype)
        if init == "zero":
            return torch.zeros(rows, dim)
        if init == "normal":
            return torch.randn(rows, dim) * 0.02
        bound = math.sqrt(6.0 / (patch_area + dim))
        return torch.empty(rows, dim).uniform_(-bound, bound)


def _is_file(init: Any) -> bool:
    return isinstance(init, (str, Path)) and str(init).endswith(_FILE)


def _read(path: str | Path) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise MethodError(f"VPT: init {path} cannot be read: {error}") from error
    check("prompts" in found, f"VPT: init {path} holds {', '.join(found) or 'nothing'}, expected a tensor 'prompts'")
    return found["prompts"]
