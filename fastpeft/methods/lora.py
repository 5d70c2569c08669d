"""LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastpeft.engine.extensions import LowRank, LowRanks
from fastpeft.engine.view import ModelView
from fastpeft.methods.base import Method, check, is_count, is_number, is_probability, names


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank adaptation (Hu et al., 2022): y = W x + (alpha / rank) B A drop(x), B = 0 at the start.

    Attributes:
        rank: inner dimension r.
        alpha: numerator of the scale; None: equal to the rank.
        targets: roles "q", "k", "v", "o", "fc1", "fc2"; in a fused projection each has its own A and B. "qkv" is one
            pair for the fused projection as a whole.
        dropout: on x before A.
    """

    name: ClassVar[str] = "lora"
    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ("q", "v")
    dropout: float = 0.0

    def __post_init__(self) -> None:
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
            pairs = {
                role: LowRank(roles[role].in_features, roles[role].out_features, self.rank, self.scale, self.dropout)
                for role in self.targets
            }
            block.attach(self.name, LowRanks(pairs))
