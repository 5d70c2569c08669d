"""What has been shown to be right and faster than what it replaces, by a result in bench/results.

(operator, kind of device, compute capability) -> backends in order of preference. An implementation that has run on no
chip is in nobody's way: it runs where it is asked for.

What may be added is said by `python -m bench.device --part summary` after the parts `verify` and `ops` have run on the
chip: a line for every implementation that has no wrong or failed row in `verify`, in bf16, fp16 or fp32, and is faster
than its reference in every row of `ops` that it does not refuse, forward and with its backward pass. The result file is
committed with the line.
"""

from __future__ import annotations

# Empty: no GPU has run the kernels yet.
PROVEN: dict[tuple[str, str, int], tuple[str, ...]] = {}
