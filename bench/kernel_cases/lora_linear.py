"""LoRA on the fused qkv projection and on the MLP's first layer, forward and backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch

from fastpeft.kernels import lora_linear


def _case(
    variant: str,
    rows: int,
    dim: int,
    out: int,
    terms: Sequence[tuple[int, int, int]],
    dtype: torch.dtype = torch.bfloat16,
    masters: bool = True,
    needs_x: bool = True,
    tf32: bool = False,
) -> Callable[[], None]:
    """A step over (start, stop, rank) terms."""

    def case() -> None:
        x = torch.empty(rows, dim, dtype=dtype, device="meta")
        weight = torch.empty(out, dim, dtype=dtype, device="meta")
        bias = torch.empty(out, dtype=dtype, device="meta")
        factor = torch.float32 if masters else dtype
        factors = [
            (
                torch.empty(rank, dim, dtype=factor, device="meta"),
                torch.empty(stop - start, rank, dtype=factor, device="meta"),
                2.0,
                start,
                stop,
            )
            for start, stop, rank in terms
        ]
        with _tf32() if tf32 else contextlib.nullcontext():
            y, h = lora_linear.forward(x, weight, bias, factors, variant=variant)
            lora_linear.backward(y, x, weight, factors, h, needs_x=needs_x, variant=variant)

    return case


@contextlib.contextmanager
def _tf32():
    """fp32 products as on the matrix units; without this they are exact and use none."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


_B = 64 * 197
_QV = ((0, 768, 8), (1536, 2304, 8))
_QKV_H = tuple((1280 * i, 1280 * (i + 1), 64) for i in range(3))

CASES: dict[str, Callable[[], object]] = {
    "B/16 q v r=8, fused": _case("fused", _B, 768, 2304, _QV),
    "B/16 q v r=8, beside": _case("beside", _B, 768, 2304, _QV),
    "L/16 shared A r=16, fused": _case("fused", _B, 1024, 3072, ((0, 3072, 16),), masters=False),
    "H/14 q k v r=64, fused": _case("fused", 64 * 257, 1280, 3840, _QKV_H),
    "H/14 q k v r=64, beside": _case("beside", 64 * 257, 1280, 3840, _QKV_H),
    "B/16 64 tokens, fused": _case("fused", 64, 768, 2304, _QV),
    "B/16 first block, fp16": _case("beside", _B, 768, 2304, _QV, torch.float16, needs_x=False),
    "B/16 q v tf32, fused": _case("fused", _B, 768, 2304, _QV, torch.float32, tf32=True),
}

# Whose candidates are compiled: one case for each way in which they are chosen.
CANDIDATES = (
    "B/16 q v r=8, beside",
    "B/16 q v r=8, fused",
    "H/14 q k v r=64, beside",
    "H/14 q k v r=64, fused",
)
