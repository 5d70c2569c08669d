"""The model names that people use, two blocks deep: the patched model against the literal one."""

from __future__ import annotations

import itertools

import pytest
import torch

import fastpeft
from fastpeft._compat import import_timm
from tests.thinned import thinned
from tests.tiny import randomise
from tests.twins import literal_of, step

timm = import_timm()

NAMES = {
    "vit_tiny_patch16_224": 64,
    "vit_base_patch16_clip_224": 64,
    "vit_huge_patch14_clip_224": 42,
    "deit_tiny_distilled_patch16_224": 64,
    "deit3_small_patch16_224": 64,
    "vit_small_patch14_reg4_dinov2": 56,
    "vit_base_patch16_siglip_224": 64,
}
METHODS = {
    "vpt-deep": fastpeft.VPT(4),
    "vpt-shallow": fastpeft.VPT(4, deep=False),
    "lora": fastpeft.LoRA(2, targets=("q", "v", "o", "fc1", "fc2")),
    "adapter": fastpeft.Adapter(8),
    "prefix": fastpeft.PrefixTuning(4),
}


@pytest.mark.parametrize("name, method", thinned(itertools.product(NAMES, METHODS), 3))
def test_logits_and_gradients(name, method):
    options = {"img_size": NAMES[name], "depth": 2, "num_classes": 5}
    base = timm.create_model(name, **options).double()
    x = torch.randn(2, 3, NAMES[name], NAMES[name], dtype=torch.float64)
    fused = fastpeft.patch(timm.create_model(name, **options), METHODS[method]).double()
    fused = randomise(fused, scale=0.05).train()
    found = step(fused, x)
    expected = step(literal_of(fused, base, METHODS[method], torch.float64).train(), x)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-8, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")
