"""What has been shown to be right and faster than what it replaces, by a result in bench/results.

(operator, kind of device, compute capability) -> backends in order of preference. An implementation that has run on no
chip is in nobody's way: it runs where it is asked for.
"""

from __future__ import annotations

# Empty: no GPU has run the kernels yet.
PROVEN: dict[tuple[str, str, int], tuple[str, ...]] = {}
