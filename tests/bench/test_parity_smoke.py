"""Fused against literal training steps on a tiny model: the comparison itself works, and finds what is wrong."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import fastpeft
from bench import parity
from bench.cases import batch, build, create_model


def tiny(**options):
    return create_model("vit_tiny_patch16_224", classes=5, image_size=48, embed_dim=48, num_heads=3, depth=3, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "method",
    [
        fastpeft.VPT(3),
        fastpeft.VPT(3, deep=False),
        fastpeft.VPT(3, depth=(2, 2), dropout_mask="batch"),
        fastpeft.LoRA(2, targets=("q", "k", "v")),
        fastpeft.LoRA(2, alpha=8, targets=("o", "fc1", "fc2"), dropout=0.2),
    ],
    ids=str,
)
def test_step_equals_the_literal_one(method, training, dtype):
    images, labels = batch(3, 48, 5, torch.float32, "cpu")
    errors, baselines = Counter(), Counter()
    # Of one step in bf16, which of two is further off is luck: a gradient of two rows has few numbers.
    draws = 4 if dtype is torch.bfloat16 else 1
    for draw in range(draws):
        torch.manual_seed(draw)
        shown = images + 0.1 * draw * torch.randn_like(images)
        for found in parity.compare(tiny(), method, shown, labels, dtype=dtype, training=training):
            errors[found.name] += found.error / draws
            baselines[found.name] += found.baseline / draws
    assert len(errors) > 3
    assert not [name for name in errors if not errors[name] <= parity.allowed_error(baselines[name], dtype)]


def test_an_error_is_found():
    method = fastpeft.LoRA(2, alpha=8)
    forgetful = build("fused", fastpeft.LoRA(2), tiny())  # without the factor alpha / rank
    images, labels = batch(3, 48, 5, torch.float32, "cpu")
    deviations = {d.name: d for d in parity.compare(tiny(), method, images, labels, patched=forgetful)}
    assert not deviations["logits"].passed
    assert "logits: relative error" in str(deviations["logits"])


def test_a_nan_never_passes():
    assert not parity.Deviation("logits", float("nan"), 1e-7, 1e-6, "").passed
