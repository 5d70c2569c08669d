"""Part `compiled`: ViT-B/16 under torch.compile, as its users would run the literal methods, against the library.

Compiling takes a minute or more a row, so there is one batch size and one method of each kind.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping

from bench.device_parts import acceptance, models, timed
from bench.device_parts.ceilings import of_record
from bench.device_parts.rows import Results, Row
from bench.device_parts.settings import DTYPES, VIT_B, Settings, Shape

METHODS = ("vpt-deep-200-batch-mask", "lora-qkv-8", "adapter-64", "vpt-deep-1", "full", "vpt-deep-200")
_SECONDS = 8.0


def rows(settings: Settings) -> Iterator[Row]:
    """Training steps, and inference with 200 prompts after the first of them."""
    shape = settings.shape(VIT_B)
    names = settings.among(METHODS)
    for name in names:
        yield f"{shape}/{settings.dtype}/train/{name}", lambda n=name: _train(settings, shape, n)
        if name == "vpt-deep-200-batch-mask":
            yield f"{shape}/{settings.dtype}/inference/vpt-deep-200", lambda: _inference(settings, shape)


def _train(settings: Settings, shape: Shape, method: str) -> dict[str, object]:
    prepared = itertools.chain(models.steps(settings, shape, method), models.compiled_steps(settings, shape, method))
    return _noted(settings, timed.row(settings, shape, method, prepared, _SECONDS))


def _inference(settings: Settings, shape: Shape) -> dict[str, object]:
    options = models.compile_options(settings)
    images, _ = settings.batch_of(shape, DTYPES[settings.dtype])

    def prepared() -> Iterator[tuple[str, Callable[[], models.Inference]]]:
        yield from models.inference(settings, shape, "vpt-deep-200")
        plain = settings.plain(shape, DTYPES[settings.dtype])
        yield "plain-compiled", lambda: models.Inference(plain, images, options)

    return _noted(settings, timed.row(settings, shape, None, prepared(), _SECONDS))


def _noted(settings: Settings, row: dict[str, object]) -> dict[str, object]:
    return row | {"torch_compile": dict(models.compile_options(settings))}


def table(rows: Mapping[str, Mapping], results: Results) -> str:
    """Every variant, then the goals."""
    return "\n".join([of_record(rows), *timed.lines(rows), "", acceptance.table(results)])
