"""LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastpeft.engine.description import CROSS_ROLES, BlockSpec
from fastpeft.engine.extensions import HeadLowRank, LowRank, LowRanks, SharedLowRank
from fastpeft.engine.view import BlockView, ModelView
from fastpeft.methods.base import Method, check, is_count, is_number, is_probability, names

_HEADS = ("joint", "shared", "each")


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank adaptation (Hu et al., 2022): y = W x + (alpha / rank) B A drop(x), B = 0 at the start.

    Attributes:
        rank: inner dimension r.
        alpha: numerator of the scale; None: equal to the rank.
        targets: roles "q", "k", "v", "o", "fc1", "fc2"; in a fused projection each has its own A and B. "qkv" is one
            pair for the fused projection as a whole.
        dropout: on x before A.
        cross: the targets among q, k, v and o mean those of attention to a memory too, where a block has it.
        heads: of a target that heads share out among themselves. "joint": one A and B for all of its width. "shared":
            B (head_dim, r) is every head's, as the mPLUG study's equation reads, which has no index for the head.
            "each": every head has an A and a B of its own.
    """

    name: ClassVar[str] = "lora"
    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ("q", "v")
    dropout: float = 0.0
    cross: bool = True
    heads: str = "joint"

    def __post_init__(self) -> None:
        super().__post_init__()
        targets = names(self.targets)
        object.__setattr__(self, "targets", targets)
        check(is_count(self.rank), f"LoRA: rank must be a positive integer, got {self.rank!r}")
        check(
            self.alpha is None or (is_number(self.alpha) and self.alpha > 0),
            f"LoRA: alpha must be a positive number or None, got {self.alpha!r}",
        )
        check(is_probability(self.dropout), f"LoRA: dropout must be in [0, 1), got {self.dropout!r}")
        check(bool(targets), "LoRA: targets is empty")
        check(all(isinstance(t, str) for t in targets), f"LoRA: targets must be names of roles, got {self.targets!r}")
        check(isinstance(self.cross, bool), f"LoRA: cross must be True or False, got {self.cross!r}")
        check(self.heads in _HEADS, f"LoRA: heads must be one of {', '.join(_HEADS)}, got {self.heads!r}")
        check(
            self.heads == "joint" or all(target in ("q", "k", "v") for target in targets),
            f"LoRA: heads={self.heads!r} goes with the targets q, k and v, got {', '.join(map(str, targets))}",
        )
        check(len(set(targets)) == len(targets), f"LoRA: targets holds a role twice: {', '.join(targets)}")

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def attach(self, model: ModelView) -> None:
        for block in model.blocks:
            roles = block.spec.roles
            for role in self.targets:
                check(role in roles, f"LoRA: {block.path} has no projection {role!r}; it has: {', '.join(roles)}")
            pairs = {role: self._pair(block, role) for role in self.roles(block.spec)}
            block.attach(self.name, LowRanks(pairs))

    def roles(self, block: BlockSpec) -> tuple[str, ...]:
        """The targets, and what they mean in a block's attention to a memory."""
        crossed = [CROSS_ROLES[target] for target in self.targets if target in CROSS_ROLES] if self.cross else []
        return (*self.targets, *(role for role in crossed if role in block.roles))

    def _pair(self, block: BlockView, role: str) -> LowRank:
        place, heads = block.spec.roles[role], block.spec.num_heads
        sizes = (place.in_features, place.out_features)
        if self.heads == "shared":
            return SharedLowRank(*sizes, self.rank, self.scale, self.dropout, heads)
        if self.heads == "each":
            return HeadLowRank(*sizes, self.rank, self.scale, self.dropout, heads)
        return LowRank(*sizes, self.rank, self.scale, self.dropout)
