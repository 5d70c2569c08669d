"""What the device reaches on what it is best at: one large matrix product, and one large copy.

Everything else is given as a share of these, and they are measured by the same process shortly before.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch

from bench.device_parts.stopwatch import device_times


@dataclass(frozen=True)
class Ceilings:
    """Measured limits.

    Attributes:
        gemm_tflops: of a square product with random numbers, in 1e12 operations a second.
        memory_gbs: of a copy, bytes read and bytes written, in 1e9 a second.
    """

    gemm_tflops: float
    memory_gbs: float

    def to_dict(self) -> dict[str, float]:
        """As a row has it."""
        return asdict(self)


@functools.cache
def measure(device: torch.device, dtype: torch.dtype, tiny: bool) -> Ceilings:
    """Measure both; once a process.

    Args:
        device: where.
        dtype: of the product.
        tiny: a product and a copy that take no time, for trying the program out.
    """
    width, count = (128, 1 << 16) if tiny else (8192, 1 << 30)
    # Zeros would run faster than numbers do, since fewer bits flip.
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    with torch.no_grad():
        times = device_times({"gemm": lambda: a @ b, "copy": lambda: target.copy_(source)}, device, turns=10)
    return Ceilings(2 * width**3 / times["gemm"].median / 1e12, 2 * count / times["copy"].median / 1e9)


def shares(operations: float, size: float, seconds: float, ceilings: Ceilings) -> dict[str, float]:
    """Rates of something that needs so many operations and bytes, and their shares of the ceilings."""
    tflops, gbs = operations / seconds / 1e12, size / seconds / 1e9
    return {
        "tflops": tflops,
        "gbs": gbs,
        "of_gemm_ceiling": tflops / ceilings.gemm_tflops,
        "of_memory_ceiling": gbs / ceilings.memory_gbs,
    }


def of_record(rows: Mapping[str, Mapping]) -> str:
    """The ceilings that rows were measured beside, as a line; the median, where there are several."""
    found = [row["ceilings"] for row in rows.values() if "ceilings" in row]
    if not found:
        return "ceilings: not measured"
    gemm, memory = (statistics.median(c[name] for c in found) for name in ("gemm_tflops", "memory_gbs"))
    return f"ceilings: {gemm:.4g} TFLOP/s in products, {memory:.4g} GB/s in copies"
