"""What results show to be right and faster than its reference: the lines that `fastpeft.ops.proven` may be given.

Right: `verify` has rows of every format, and none of them is wrong or failed. Faster: in every case of `ops`, forward
and with its backward pass, than the reference beside it. A case or a format that the implementation refuses counts
neither way, since the reference runs there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from bench.device_parts.operators import default_variant
from bench.device_parts.rows import Results
from bench.device_parts.settings import FORMATS

# Of `ops` on a GPU.
TIMED_FORMAT = "bfloat16"


def lines(results: Results) -> list[str]:
    """What can be added, and of every other implementation why it cannot."""
    if results.chip is None:
        return ["run in little: shows nothing about fastpeft/ops/proven.py"]
    verified, timed = results.rows("verify"), results.rows("ops")
    found: dict[str, list[tuple[float, str]]] = {}
    said = []
    for operator, name in sorted(_implementations(verified)):
        backend, _, variant = name.partition(":")
        if backend == "triton" and results.chip[0] == "cpu":
            said.append(f"not proven: {operator}, {name}: interpreted, which says nothing about a chip")
            continue
        reasons = [*_not_right(operator, name, verified), *_not_faster(operator, name, timed)]
        default = default_variant(operator, backend, results.chip[1]) if variant else None
        if variant and variant != default:
            reasons.append(f"the default of this chip is {default}")
        if reasons:
            said.append(f"not proven: {operator}, {name}: {'; '.join(reasons)}")
        else:
            found.setdefault(operator, []).append((_mean(operator, name, timed), backend))
    kind, capability = results.chip
    proven = []
    for operator, backends in found.items():
        ordered = tuple(backend for _, backend in sorted(backends, reverse=True))
        proven.append(f"    {(operator, kind, capability)}: {ordered},".replace("'", '"'))
    heading = "lines for PROVEN in fastpeft/ops/proven.py:" if proven else "no line for fastpeft/ops/proven.py yet"
    return [*said, heading, *proven]


def _implementations(verified: Mapping) -> set[tuple[str, str]]:
    return {tuple(key.split("/")[1:3]) for key in verified if key.startswith("operator/")}


def _not_right(operator: str, name: str, verified: Mapping[str, Mapping]) -> Iterator[str]:
    for kind in FORMATS:
        prefix = f"operator/{operator}/{name}/{kind}/"
        rows = [row for key, row in verified.items() if key.startswith(prefix)]
        right = sum(row.get("passed") is True for row in rows)
        bad = sum("error" in row or row.get("passed") is False for row in rows)
        if bad:
            yield f"{bad} of {len(rows)} cases in {kind} wrong or failed"
        elif not right and (not rows or kind == TIMED_FORMAT):
            yield f"no case verified in {kind}"


def _cases(operator: str, name: str, timed: Mapping[str, Mapping]) -> Iterator[tuple[str, Mapping, Mapping]]:
    for key, row in timed.items():
        variants = row.get("variants", {})
        if key.startswith(f"{operator}/") and name in variants and "both" in variants.get("reference", {}):
            yield key.partition("/")[2], variants[name], variants["reference"]


def _ratios(variant: Mapping, reference: Mapping) -> list[float]:
    return [reference[phase]["median_ms"] / variant[phase]["median_ms"] for phase in ("forward", "both")]


def _not_faster(operator: str, name: str, timed: Mapping[str, Mapping]) -> Iterator[str]:
    cases = list(_cases(operator, name, timed))
    ran = [case for case in cases if "both" in case[1]]
    if not ran:
        yield "not timed"
    for case, variant, _ in cases:
        if "error" in variant or variant.get("passed") is False:
            yield f"wrong or failed in {case}"
    slow = [(case, min(_ratios(variant, reference))) for case, variant, reference in ran]
    slow = [f"{case} {ratio:.2f}x" for case, ratio in slow if ratio <= 1]
    if slow:
        yield f"slower than the reference in {len(slow)} of {len(ran)} cases ({', '.join(slow[:3])})"


def _mean(operator: str, name: str, timed: Mapping[str, Mapping]) -> float:
    """Geometric mean of the speed-ups."""
    logs = [
        math.log(r) for _, v, reference in _cases(operator, name, timed) if "both" in v for r in _ratios(v, reference)
    ]
    return math.exp(sum(logs) / len(logs))
