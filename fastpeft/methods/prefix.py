"""Prefix tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastpeft.engine.extensions import FixedKeyValues, KeyValues, Noise, Prompts
from fastpeft.engine.view import ModelView
from fastpeft.methods.base import Method, check, is_count


@dataclass(frozen=True)
class PrefixTuning(Method):
    """Learned context before every block.

    form="kv" (Li & Liang, 2021):   head = Attn(x W_q, [P_k; x W_k], [P_v; x W_v])
    form="hidden" (mPLUG study):    block([P; x]), and the outputs at P are dropped

    With `mlp` the keys and values of a block are [P_k, P_v] = W_2 tanh(W_1 E + b_1) + b_2, E of shape (length, d), and
    the hidden form's P is that too. `fastpeft.fold_prefix` leaves this method without `mlp` in its place,
    `fastpeft.merge` frozen keys and values.

    Attributes:
        length: prefix tokens a block.
        form: "kv" or "hidden".
        mlp: width of the re-parameterisation, None for none.
    """

    name: ClassVar[str] = "prefix"
    length: int
    form: str = "kv"
    mlp: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check(is_count(self.length), f"PrefixTuning: length must be a positive integer, got {self.length!r}")
        check(self.form in ("kv", "hidden"), f"PrefixTuning: form must be 'kv' or 'hidden', got {self.form!r}")
        check(self.mlp is None or is_count(self.mlp), f"PrefixTuning: mlp must be a width or None, got {self.mlp!r}")

    def attach(self, model: ModelView) -> None:
        for block in model.blocks:
            width = block.spec.roles["k"].out_features
            if self.form == "hidden" and self.mlp is not None:
                extension = MLPPrompts(self.length, block.dim, self.mlp)
            elif self.form == "hidden":
                extension = Prompts(nn.Parameter(torch.randn(self.length, block.dim) * 0.02), self.length)
            elif self.mlp is None:
                extension = FixedKeyValues(*(torch.randn(self.length, width) * 0.02 for _ in range(2)))
            else:
                extension = MLPKeyValues(self.length, block.dim, self.mlp, width)
            block.attach(self.name, extension)


class MLPPrompts(Prompts):
    """Hidden states as the output of a small network."""

    def __init__(self, length: int, dim: int, hidden: int):
        super().__init__(nn.Parameter(torch.randn(length, dim)), length)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, dim))

    def rows(self, batch: int, dtype: torch.dtype, noise: Noise | None) -> Tensor:
        return self.mlp(self.prompts).to(dtype)


class MLPKeyValues(KeyValues):
    """Keys and values as the output of a small network."""

    def __init__(self, length: int, dim: int, hidden: int, width: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(length, dim))
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, 2 * width))

    def keys_values(self) -> tuple[Tensor, Tensor]:
        return self.mlp(self.embedding).chunk(2, dim=-1)
