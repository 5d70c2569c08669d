"""Both halves of a frozen MLP around its activation, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastpeft.kernels import mlp


def _case(
    variant: str,
    rows: int,
    dim: int,
    keep: str,
    activation: str = "gelu",
    dtype: torch.dtype = torch.bfloat16,
    tf32: bool = False,
) -> Callable[[], None]:
    """A step of an MLP four times as wide inside."""

    def case() -> None:
        x = torch.empty(rows, dim, dtype=dtype, device="meta")
        first = torch.empty(4 * dim, dim, dtype=dtype, device="meta")
        second = torch.empty(dim, 4 * dim, dtype=dtype, device="meta")
        bias = torch.empty(4 * dim, dtype=dtype, device="meta")
        before = torch.backends.cuda.matmul.allow_tf32
        # Exact fp32 products use no matrix unit.
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            a, kept = mlp.forward(x, first, bias, activation, keep=keep, variant=variant)
            mlp.backward_input(x, second, a if kept is None else kept, activation, keep=keep, variant=variant)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return case


_B = 64 * 197

CASES: dict[str, Callable[[], object]] = {
    "B/16 z, fused": _case("fused", _B, 768, "preactivation"),
    "B/16 z, beside": _case("beside", _B, 768, "preactivation"),
    "B/16 8 bits, fused": _case("fused", _B, 768, "derivative8"),
    "B/16 8 bits, beside": _case("beside", _B, 768, "derivative8"),
    "L/16 CLIP, fused": _case("fused", _B, 1024, "nothing", "quick_gelu"),
    "H/14 tanh 8 bits, fused": _case("fused", 64 * 257, 1280, "derivative8", "gelu_tanh"),
    "B/16 64 tokens, fused": _case("fused", 64, 768, "preactivation"),
    "B/16 z fp16, fused": _case("fused", _B, 768, "preactivation", dtype=torch.float16),
    "B/16 z tf32, fused": _case("fused", _B, 768, "preactivation", dtype=torch.float32, tf32=True),
}

# Whose candidates are compiled: one case for each way in which they are chosen.
CANDIDATES = (
    "B/16 z, fused",
    "B/16 8 bits, fused",
    "B/16 8 bits, beside",
    "B/16 z tf32, fused",
)
