"""Fused against literal training steps on a tiny model: the comparison itself works, and finds what is wrong."""

from __future__ import annotations

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
    deviations = parity.compare(tiny(), method, images, labels, dtype=dtype, training=training)
    assert len(deviations) > 3
    assert not [str(d) for d in deviations if not d.passed]


def test_an_error_is_found():
    method = fastpeft.LoRA(2, alpha=8)
    forgetful = build("fused", fastpeft.LoRA(2), tiny())  # without the factor alpha / rank
    images, labels = batch(3, 48, 5, torch.float32, "cpu")
    deviations = {d.name: d for d in parity.compare(tiny(), method, images, labels, patched=forgetful)}
    assert not deviations["logits"].passed
    assert "logits: relative error" in str(deviations["logits"])


def test_a_nan_never_passes():
    assert not parity.Deviation("logits", float("nan"), 1e-7, 1e-6, "").passed
