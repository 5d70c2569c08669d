"""Part `mplug`: training steps of mPLUG-base, the library's against the literal implementation, all eager.

The same cases as of `python -m bench.mplug_cost`: captioning and VQA, the image tower's tokens cached or images given,
five methods, dropout off. Before they are timed, all have to have the literal step's loss and gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from bench.device_parts import timed
from bench.device_parts.ceilings import of_record
from bench.device_parts.rows import Results, Row, Unavailable
from bench.device_parts.settings import MPLUG, Settings
from bench.mplug_cost.cases import LITERAL, METHODS, OURS, Case, cases
from bench.mplug_cost.floor import floor_of
from bench.mplug_cost.steps import MPlugStep, agreement, step_of

_SECONDS = 8.0
_FORMATS = {"bfloat16": "bf16", "float32": "fp32"}


def rows(settings: Settings) -> Iterator[Row]:
    """A row a case, tokens cached before images given."""
    methods = [name for name, full in zip(METHODS, MPLUG, strict=True) if full in settings.methods]
    for images in ("cached", "given"):
        for case in cases(
            methods, None, [images], batch=settings.batch, tiny=settings.tiny, device=str(settings.device)
        ):
            tiny = "-tiny" if settings.tiny else ""
            key = f"mplug-base{tiny}/b{case.batch}/{settings.dtype}/train/{case.task}/{images}/{case.method}"
            yield key, lambda c=case: _row(settings, c)


def _row(settings: Settings, case: Case) -> dict[str, object]:
    if settings.dtype not in _FORMATS:
        raise Unavailable(f"mPLUG's steps are compared in {', '.join(_FORMATS)}, not in {settings.dtype}")
    case = Case(**{**vars(case), "dtype": _FORMATS[settings.dtype]})
    literal = step_of(case, LITERAL)
    floor = floor_of(literal)
    apart: dict[str, object] = {}

    def ours(backend: str) -> MPlugStep:
        step = step_of(case, OURS, backend)
        apart[backend] = agreement(literal, step, case.dtype)
        return step

    def prepared() -> timed.Prepared:
        for backend in settings.backends:
            yield backend, lambda b=backend: ours(b)
        yield LITERAL, lambda: step_of(case, LITERAL)

    found = timed.beside(settings, case.batch, (floor, floor.operations), prepared(), _SECONDS)
    return {**found, "apart": apart}


def table(rows: Mapping[str, Mapping], results: Results) -> str:
    """Every variant."""
    return "\n".join([of_record(rows), *timed.lines(rows)])
