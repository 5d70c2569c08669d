"""What has been shown to be right and faster than what it replaces, by a result in bench/results.

(operator, kind of device, capability) -> backends in order of preference; the capability of a GPU is its compute
capability, 90 for sm_90, that of a CPU the position of its instruction set in `fastpeft._native.LEVELS`. An
implementation that has run on no chip is in nobody's way: it runs where it is asked for.

What may be added is said by `python -m bench.device --part summary` after the parts `verify` and `ops` have run on the
chip: a line for every implementation that has no wrong or failed row in `verify`, in bf16, fp16 or fp32, and is faster
than its reference in every row of `ops` that it does not refuse, forward and with its backward pass. The result file is
committed with the line.
"""

from __future__ import annotations

from fastpeft._native import LEVELS

_AMX, _AVX2 = list(LEVELS).index("amx"), list(LEVELS).index("avx2")

# No GPU has run the kernels yet.
PROVEN: dict[tuple[str, str, int], tuple[str, ...]] = {
    ("block", "cpu", _AMX): ("cpu",),
    # bench/results/intel-r-xeon-r-processor/native_ops.json. The adapter and the MLP alone are not faster there.
    ("prompt_attention", "cpu", _AMX): ("cpu",),
    ("layer_norm", "cpu", _AMX): ("cpu",),
    ("linear_cross_entropy", "cpu", _AMX): ("cpu",),
    # bench/results/amd-epyc/native_ops.json. LayerNorm, the adapter and the MLP alone are not faster there. The products
    # of the last have no bf16 rows: torch's own take 45 times as long as in fp32.
    ("prompt_attention", "cpu", _AVX2): ("cpu",),
    ("linear_cross_entropy", "cpu", _AVX2): ("cpu",),
}
