"""What a tuning method may add to a block.

A method composes these; the engine runs them. Each is a child module of the block it acts on, named after the method,
so that its tensors read `blocks.3.vpt.prompts` or `blocks.3.lora.q.A`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastpeft.engine.clock import DropoutClock
from fastpeft.ops.adapter import adapter
from fastpeft.ops.dropout_mask import dropout_mask
from fastpeft.ops.dropped_rows import dropped_rows
from fastpeft.ops.lora_linear import LowRankTerm

_SITES_PER_BLOCK = 64


class Noise(NamedTuple):
    """The counter's state that one forward of a block draws from."""

    clock: DropoutClock
    step: Tensor

    def mask(self, site: int, batch: int | None, size: int, p: float, dtype: torch.dtype) -> Tensor:
        """Multipliers (batch, size), or (size,) for a mask that the batch shares (`batch=None`)."""
        samples = None if batch is None else (self.clock.rank * batch, batch)
        return dropout_mask(self.clock.seed, self.step, site, samples, size, p, dtype)

    def drop(self, x: Tensor, site: int, batch: int, p: float) -> Tensor:
        """Shared rows x (p, d) as (batch, p, d), with a mask for each sample."""
        return dropped_rows(x, self.clock.seed, self.step, site, (self.clock.rank * batch, batch), p)


class Extension(nn.Module):
    """Base of everything that a method adds to a block.

    Attributes:
        site: number of the place, for dropout; set when the extension is attached.
    """

    site: int = 0

    def place(self, block: int, position: int) -> None:
        """Learn where in the model this extension stands."""
        self.site = (block * _SITES_PER_BLOCK + position) * _SITES_PER_BLOCK

    @property
    def draws(self) -> bool:
        """Whether its training forward needs random numbers."""
        return False

    def bottleneck(self, location: str) -> Bottleneck | None:
        """The bottleneck adapter that it is at a location, if it is nothing but that; a serial one has a skip."""
        return None


class Prompts(Extension):
    """Learned hidden states that join the block's input rows.

    Attributes:
        prompts: (p, d), or (1, d) repeated p times.
        length: p.
        dropout: probability, drawn again at every insertion.
        per_sample: every image has its own mask; otherwise the batch shares one.
        index: (batch,), which of several sets each sample has; None: one set.
        carried: the outputs at these rows go on to the next block; `ModelView.carry` says so.
    """

    index: Tensor | None = None
    carried: bool = False

    def __init__(self, prompts: nn.Parameter, length: int, dropout: float = 0.0, per_sample: bool = True):
        super().__init__()
        self.prompts = prompts
        self.length = length
        self.dropout = dropout
        self.per_sample = per_sample

    @property
    def draws(self) -> bool:
        return self.dropout > 0

    def rows(self, batch: int, dtype: torch.dtype, noise: Noise | None) -> Tensor:
        """The rows to insert: (p, d) shared by the batch, or (batch, p, d)."""
        rows = self.prompts.to(dtype).expand(self.length, -1)
        if not (self.training and self.dropout > 0):
            return rows
        if self.per_sample:
            return noise.drop(rows, self.site, batch, self.dropout)
        return rows * noise.mask(self.site, None, rows.numel(), self.dropout, dtype).view(rows.shape)

    def extra_repr(self) -> str:
        return f"length={self.length}, dim={self.prompts.shape[-1]}, dropout={self.dropout}"


class PromptBank(Prompts):
    """Several sets of prompts, of which each sample has one. No dropout.

    Attributes:
        prompts: (T, p, d), or (T, 1, d) repeated p times.
        index: (batch,), set before the model is called.
    """

    def rows(self, batch: int, dtype: torch.dtype, noise: Noise | None) -> Tensor:
        """All sets, (T, p, d)."""
        return self.prompts.to(dtype).expand(-1, self.length, -1)


class InputPrompts(Extension):
    """Learned rows before the input of a stack of blocks; its first block holds them, the host inserts them.

    Attributes:
        prompts: (p, d).
    """

    def __init__(self, prompts: nn.Parameter):
        super().__init__()
        self.prompts = prompts

    @property
    def length(self) -> int:
        return self.prompts.shape[0]

    def rows(self, batch: int, dtype: torch.dtype, noise: Noise | None) -> Tensor:
        """(p, d)."""
        return self.prompts.to(dtype)


class KeyValues(Extension):
    """Learned keys and values that every query of the block sees."""

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """(p, d) keys and (p, d) values; head h owns the columns h * head_dim to (h + 1) * head_dim."""
        raise NotImplementedError(f"{type(self).__name__} must define keys_values()")


class FixedKeyValues(KeyValues):
    """Keys and values as plain tensors."""

    def __init__(self, k: Tensor, v: Tensor):
        super().__init__()
        self.k = nn.Parameter(k)
        self.v = nn.Parameter(v)

    def keys_values(self) -> tuple[Tensor, Tensor]:
        return self.k, self.v


class LowRank(nn.Module):
    """A pair of factors: y += scale * drop(x) A^T B^T.

    Attributes:
        A: (r, in).
        B: (out, r).
    """

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, dropout: float = 0.0):
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.scale = scale
        self.dropout = dropout

    def extra_repr(self) -> str:
        return f"rank={self.A.shape[0]}, scale={self.scale}, dropout={self.dropout}"

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) as the layer's columns need them."""
        return self.A, self.B


class SharedLowRank(LowRank):
    """Factors that all heads share: every head's columns get the same product.

    Attributes:
        A: (r, in).
        B: (head_dim, r).
    """

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, dropout: float, heads: int):
        super().__init__(in_features, out_features // heads, rank, scale, dropout)
        self.heads = heads

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B.repeat(self.heads, 1)


class HeadLowRank(LowRank):
    """Factors of every head's own.

    Attributes:
        A: (heads * r, in), one head's behind another's.
        B: (heads * head_dim, r), likewise.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, dropout: float, heads: int):
        super().__init__(in_features, out_features, rank, scale, dropout)
        self.A = nn.Parameter(torch.empty(heads * rank, in_features))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.heads = heads

    def factors(self) -> tuple[Tensor, Tensor]:
        rank = self.B.shape[1]
        blocks = torch.eye(self.heads, dtype=self.B.dtype, device=self.B.device)[:, None, :, None]
        spread = self.B.view(self.heads, -1, 1, rank) * blocks
        return self.A, spread.reshape(self.B.shape[0], self.heads * rank)


class LowRanks(Extension):
    """Low-rank terms by role; each role is a child module."""

    def __init__(self, roles: dict[str, LowRank]):
        super().__init__()
        for role, pair in roles.items():
            self.add_module(role, pair)

    @property
    def roles(self) -> dict[str, LowRank]:
        return self._modules

    @property
    def draws(self) -> bool:
        return any(pair.dropout > 0 for pair in self.roles.values())

    def term(self, role: str, start: int, stop: int, noise: Noise | None) -> LowRankTerm | None:
        """The role's term in output columns start to stop, or None if the role has none."""
        pair = self.roles.get(role)
        if pair is None:
            return None
        drop = self._drop(pair, role, noise) if self.training and pair.dropout > 0 else None
        return LowRankTerm(*pair.factors(), pair.scale, start, stop, drop)

    def _drop(self, pair: LowRank, role: str, noise: Noise) -> Callable[[Tensor], Tensor]:
        site = self.site + 1 + list(self.roles).index(role)

        def drop(x: Tensor) -> Tensor:
            mask = noise.mask(site, x.shape[0], math.prod(x.shape[1:]), pair.dropout, x.dtype)
            return x * mask.view(x.shape)

        return drop


class Bottleneck(nn.Module):
    """down, activation, up: A(x) = act(x W_down^T + b_down) W_up^T + b_up.

    Attributes:
        down: Linear(dim, hidden).
        up: Linear(hidden, dim); starts at zero, so that the adapter starts as the identity.
        act: a name of `fastpeft.ops.activation.FUNCTIONS`.
        skip: add x to the result.
        scale: factor of the up-projection's output.
    """

    def __init__(self, dim: int, hidden: int, act: str, bias: bool, skip: bool, scale: float = 1.0):
        super().__init__()
        self.down = nn.Linear(dim, hidden, bias=bias)
        self.up = nn.Linear(hidden, dim, bias=bias)
        self.act = act
        self.skip = skip
        self.scale = scale
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)
        if bias:
            nn.init.zeros_(self.down.bias)
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, beside: Tensor | None = None, backend: str = "auto") -> Tensor:
        """(..., dim) -> (..., dim); `beside` is added to the result."""
        residual = x if self.skip else beside
        factors = (self.down.weight, self.down.bias, self.up.weight, self.up.bias)
        y = adapter(x, *factors, self.act, self.scale, residual, backend)
        return beside + y if self.skip and beside is not None else y


class Adapters(Extension):
    """Adapters behind ("serial") or beside ("parallel") the sub-layers of a block.

    Serial:   branch = A(scale(f(norm(x))))
    Parallel: branch = scale(f(norm(x))) + A(norm(x))

    `scale` is the model's LayerScale. Children are named by location: "attn", "ffn".
    """

    def __init__(self, mode: str, locations: dict[str, nn.Module]):
        super().__init__()
        self.mode = mode
        for location, inner in locations.items():
            self.add_module(location, inner)

    def acts_on(self, location: str) -> bool:
        """Whether there is an adapter at a location, "attn" or "ffn"."""
        return location in self._modules

    def bottleneck(self, location: str) -> Bottleneck | None:
        inner = self._modules[location]
        # Whoever runs a serial adapter within a branch adds the branch to it; without a skip A(f) stands in f's place.
        return inner if type(inner) is Bottleneck and (inner.skip or self.mode != "serial") else None

    def apply_to(self, location: str, branch: Tensor, normed: Tensor, backend: str = "auto") -> Tensor:
        """The residual branch at a location with the adapter in it; shapes (B, n, d)."""
        inner = self._modules[location]
        if not isinstance(inner, Bottleneck):
            return inner(branch) if self.mode == "serial" else branch + inner(normed)
        return inner(branch, None, backend) if self.mode == "serial" else inner(normed, branch, backend)


class SingleAdapter(Bottleneck, Extension):
    """One serial adapter behind the FFN whose tensors hang on the block without a location in their name."""

    mode = "serial"

    def acts_on(self, location: str) -> bool:
        return location == "ffn"

    def bottleneck(self, location: str) -> Bottleneck | None:
        return self if self.skip else None

    def apply_to(self, location: str, branch: Tensor, normed: Tensor, backend: str = "auto") -> Tensor:
        return self(branch, None, backend)
