"""Latency of a training step of ViT-S/16: fused, literal and, for LoRA, peft.

    pytest bench --benchmark-only

Each benchmark notes the time of the unavoidable matrix products, measured right beside it, the share of the step that
they are, and the bytes kept for backward. For ratios to quote, where the variants take turns: `python -m bench.device`.
"""

from __future__ import annotations

import pytest
import torch

from bench.cases import METHODS, TrainingStep, batch, build, create_model, has_peft, token_rows
from bench.memory import saved_bytes
from bench.timing import floor, interleave

_CLASSES, _BATCH, _SIZE = 100, 8, 224
_ROWS = [
    (name, variant)
    for name in ("vpt-deep-10", "lora-qkv-8", "adapter-8")
    for variant in ("fused", "literal", "peft")
    if variant != "peft" or has_peft(METHODS[name]())
]


@pytest.fixture(scope="module")
def plain() -> torch.nn.Module:
    """The model that all rows copy."""
    return create_model("vit_small_patch16_224", _CLASSES, _SIZE)


@pytest.mark.parametrize(("name", "variant"), _ROWS)
def test_training_step(benchmark, device, plain, name, variant):
    """Time one row; nothing is asserted about the time."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build(variant, METHODS[name](), plain.to(device, dtype))
    images, labels = batch(_BATCH, _SIZE, _CLASSES, dtype, device)
    step = TrainingStep(model, images, labels)
    kept = saved_bytes(lambda: model(images), model)
    backbone = build("literal", METHODS[name](), plain)
    products = interleave({"floor": floor(backbone, token_rows(backbone, _BATCH))}, device=device, turns=3)["floor"]

    def timed() -> None:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = name
    benchmark.pedantic(timed, rounds=5, warmup_rounds=1)
    benchmark.extra_info |= {
        "floor_ms": products.median * 1000,
        "fraction_of_floor": products.median / benchmark.stats.stats.median,
        "saved_bytes": kept,
        "batch": _BATCH,
        "dtype": str(dtype),
    }
