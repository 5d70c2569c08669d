"""Part `verify`: is every kernel right, and every method's training step on every backend.

An operator is compared, forward and backward, with its reference in float64, beside plain PyTorch in the inputs' own
format (`bench.tolerance`); its memory is poisoned, and the same call is repeated. A training step is compared with the
literal implementation in float64 (`bench.parity`). Inputs are drawn afresh; the row has their seed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import torch

import fastpeft
from bench.cases import METHODS
from bench.device_parts import proof
from bench.device_parts.operators import INTERPRETED_BFLOAT16, Builder, each, function_of, implementations, why_not
from bench.device_parts.rows import Results, Row, Unavailable, grouped
from bench.device_parts.settings import FORMATS, Settings, Shape
from bench.parity import compare
from fastpeft.ops.choose import chip_of

# Batch normalisation of hidden units that ReLU leaves nearly always at zero magnifies the features' rounding: in
# bfloat16 the literal implementation is itself 20% off. In float64 there is something to compare with.
_ILL_CONDITIONED = {("mlp-3", "train")}


def rows(settings: Settings) -> Iterator[Row]:
    """Operators first: a step that is wrong because an operator is says less than that operator's row."""
    yield from _operators(settings)
    yield from _steps(settings)


def _operators(settings: Settings) -> Iterator[Row]:
    able = {}
    for operator in settings.operators:
        for name in implementations(operator, settings.device):
            for kind in FORMATS:
                reason = why_not(operator, name, getattr(torch, kind), settings.device)
                able[operator, name, kind] = reason is None
                if reason is not None:
                    yield f"operator/{operator}/{name}/{kind}/every case", lambda reason=reason: _refuse(reason)
    for operator, case, builder in each("checked", settings.operators, settings.tiny):
        for (owner, name, kind), possible in able.items():
            if owner == operator and possible:
                key = f"operator/{operator}/{name}/{kind}/{case}"
                yield key, lambda o=operator, b=builder, n=name, k=kind: _operator(settings, o, b, n, k)


def _refuse(reason: str) -> dict[str, object]:
    raise Unavailable(reason)


def _operator(settings: Settings, operator: str, builder: Builder, name: str, kind: str) -> dict[str, object]:
    seed = _seed(settings)
    torch.manual_seed(seed)
    problem = builder(getattr(torch, kind), settings.device)
    # xformers promises no order of additions; ours do.
    deterministic = name.partition(":")[0] != "xformers"
    return {"seed": seed, **problem.check(function_of(operator, name, problem)).row(deterministic)}


def _steps(settings: Settings) -> Iterator[Row]:
    shape = settings.shape(images=16 if settings.tiny else 32)
    for method in settings.among(METHODS):
        for mode in ("train", "eval"):
            for kind in ("float64",) if (method, mode) in _ILL_CONDITIONED else ("float32", "bfloat16"):
                for backend in settings.backends:
                    key = f"step/{shape}/{backend}/{kind}/{mode}/{method}"
                    yield key, lambda *, m=method, t=mode, k=kind, b=backend: _step(settings, shape, m, t, k, b)


def _step(settings: Settings, shape: Shape, name: str, mode: str, kind: str, backend: str) -> dict[str, object]:
    if backend == "triton" and kind == "bfloat16" and chip_of(settings.device).interpreted:
        raise Unavailable(INTERPRETED_BFLOAT16)
    seed = _seed(settings)
    method, dtype = METHODS[name](), getattr(torch, kind)
    patched = fastpeft.patch(settings.plain(shape, dtype), method, backend=backend)
    images, labels = settings.batch_of(shape, torch.float32, seed)
    training = mode == "train"
    model = settings.plain(shape)
    found = compare(model, method, images, labels, dtype=dtype, training=training, patched=patched, seed=seed)
    worst = max(found, key=lambda d: d.error / d.bound)
    return {
        "seed": seed,
        "passed": all(d.passed for d in found),
        "tensors": len(found),
        "relative_error": worst.error if worst.error < float("inf") else "inf",
        "plain_error": worst.baseline,
        "bound": worst.bound,
        "worst": str(worst),
        "failed": [str(d) for d in found if not d.passed][:10],
    }


def _seed(settings: Settings) -> int:
    return int.from_bytes(os.urandom(4), "little") if settings.seed is None else settings.seed


def table(rows: Mapping[str, Mapping], results: Results) -> str:
    """One line a group of rows, then those that are wrong, and what can be added to `fastpeft.ops.proven`."""
    groups: dict[str, list[Mapping]] = {}
    for key, row in rows.items():
        parts = key.split("/")
        label = "/".join(parts[:4]) if parts[0] == "operator" else "/".join(("step", *parts[-4:-1]))
        groups.setdefault(label, []).append(row)
    lines = [f"{'':<52} {'right':>6} {'wrong':>6} {'errors':>6} {'absent':>6}   nearest to its bound"]
    for label, members in groups.items():
        right, wrong = (sum(row.get("passed") is verdict for row in members) for verdict in (True, False))
        errors, absent = (sum(name in row for row in members) for name in ("error", "unavailable"))
        ran = [row for row in members if "bound" in row]
        nearest = max((float(row["relative_error"]) / row["bound"] for row in ran), default=None)
        share = "" if nearest is None else f"{nearest:.2f} of it"
        lines.append(f"{label:<52} {right:>6} {wrong:>6} {errors:>6} {absent:>6}   {share}")
    return "\n".join([*lines, *grouped(rows), "", *proof.lines(results)])
