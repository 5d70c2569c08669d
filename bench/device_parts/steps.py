"""Part `steps`: training steps and inference, the library's against the literal implementation and peft, all eager.

ViT-B/16 has every row of the VPT paper's cost table, ViT-L/16 and ViT-H/14 the methods between which the others lie.
Rows that the project's goals are about come first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from bench.device_parts import acceptance, models, timed
from bench.device_parts.ceilings import of_record
from bench.device_parts.rows import Results, Row
from bench.device_parts.settings import VIT_B, VIT_H, VIT_L, Settings, Shape

# The table's rows (side-tuning has no implementation here), with the goals' rows before them.
GOALS = ("vpt-deep-200-batch-mask", "vpt-deep-1", "lora-qkv-8", "adapter-64")
TABLE_12 = (
    "vpt-deep-200",
    "full",
    "linear",
    "partial-1",
    "mlp-3",
    "bias",
    "adapter-8",
    "adapter-256",
    "vpt-shallow-1",
    "vpt-shallow-200",
)
_LARGE = ("vpt-deep-200-batch-mask", "lora-qkv-8", "full", "vpt-deep-200")
_SECONDS = 8.0


def rows(settings: Settings) -> Iterator[Row]:
    """Small batches first."""
    named = (*GOALS, *TABLE_12)
    base, wide = settings.shape(VIT_B), settings.shape(VIT_B, None if settings.chosen else 4 * settings.batch)
    yield from _own(settings, base)
    yield from _steps(settings, base, settings.among(named))
    yield from _inference(settings, base, settings.among(named))
    if settings.chosen:
        return
    for name in (VIT_H, VIT_L):
        yield from _steps(settings, settings.shape(name), settings.among(_LARGE))
    yield from _steps(settings, wide, settings.among(named))
    for name in (VIT_H, VIT_L):
        yield from _inference(settings, settings.shape(name), settings.among(_LARGE))


def _steps(settings: Settings, shape: Shape, names: list[str]) -> Iterator[Row]:
    for name in names:
        yield (
            f"{shape}/{settings.dtype}/train/{name}",
            lambda n=name: timed.row(settings, shape, n, models.steps(settings, shape, n), _SECONDS),
        )


def _inference(settings: Settings, shape: Shape, names: list[str]) -> Iterator[Row]:
    for name in names:
        yield (
            f"{shape}/{settings.dtype}/inference/{name}",
            lambda n=name: timed.row(settings, shape, None, models.inference(settings, shape, n), _SECONDS / 2),
        )


def _own(settings: Settings, shape: Shape) -> Iterator[Row]:
    """The library's own steps beside each other: what a goal compares has to take turns in one process."""
    names = settings.among(("vpt-deep-1", "vpt-deep-200-batch-mask", "vpt-deep-200", "lora-qkv-8"))
    if "vpt-deep-1" not in names or len(names) < 2:
        return

    def prepared() -> models.Prepared:
        for method in names:
            for variant, prepare in models.steps(settings, shape, method):
                if variant not in ("literal", "peft"):
                    yield f"{method} {variant}", prepare

    key = f"{shape}/{settings.dtype}/train/{acceptance.OWN}"
    yield key, lambda: timed.row(settings, shape, "vpt-deep-1", prepared(), 2 * _SECONDS)


def table(rows: Mapping[str, Mapping], results: Results) -> str:
    """Every variant, then the goals."""
    return "\n".join([of_record(rows), *timed.lines(rows), "", acceptance.table(results)])
