"""How methods start: as the identity where their papers say so, and with the papers' numbers of parameters."""

from __future__ import annotations

import pytest
import torch

import fastpeft
from tests.tiny import FEW, METHODS, VARIANTS, images, timm, vit

IDENTITIES = {
    "linear": fastpeft.Linear(),
    "bitfit": fastpeft.BitFit(),
    "partial": fastpeft.Partial(2),
    "full": fastpeft.Full(),
    "lora": fastpeft.LoRA(2, alpha=7, targets=("q", "k", "v", "o")),
    "adapter": fastpeft.Adapter(8),
    "adapter-released": fastpeft.Adapter(8, init="released"),
    "serial": fastpeft.SerialAdapter(6),
    "serial-bias": fastpeft.SerialAdapter(6, bias=True),
    "parallel": fastpeft.ParallelAdapter(6, scale=4.0),
    "lora+serial": fastpeft.LoRA(2) + fastpeft.SerialAdapter(6),
}
NOT_IDENTITIES = {
    "vpt": fastpeft.VPT(3),
    "prefix": fastpeft.PrefixTuning(3),
    "parallel-skip": fastpeft.ParallelAdapter(6, skip=True),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", IDENTITIES)
def test_starts_as_the_identity(variant, method):
    base, x = vit(variant, dtype=torch.float64).eval(), images(variant, dtype=torch.float64)
    model = fastpeft.patch(vit(variant, dtype=torch.float64), IDENTITIES[method]).eval()
    torch.testing.assert_close(model(x), base(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", NOT_IDENTITIES)
def test_does_not_start_as_the_identity(method):
    model = fastpeft.patch(vit(), NOT_IDENTITIES[method]).eval()
    assert not torch.allclose(model(images()), vit().eval()(images()), atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_method_tensors_are_named_after_their_block_and_start_in_float32(method):
    base = vit()
    model = fastpeft.patch(vit(dtype=torch.bfloat16), METHODS[method])
    new = set(model.state_dict()) - set(base.state_dict())
    parts = {part.name for part in METHODS[method].parts()}
    for name in new:
        where, number, kind, *_ = name.split(".")
        assert (where == "head" and "mlp_head" in parts) or (where == "blocks" and number.isdigit() and kind in parts)
        assert model.state_dict()[name].dtype in (torch.float32, torch.int64)
    assert set(base.state_dict()) <= set(model.state_dict())


@pytest.mark.parametrize("variant", ["class_token", "distilled"])
def test_the_head_is_kept_as_it_is(variant):
    base = vit(variant)
    for method in FEW:
        model = fastpeft.patch(vit(variant), METHODS[method])
        for head in ("head", "head_dist"):
            if hasattr(base, head):
                assert torch.equal(getattr(model, head).weight, getattr(base, head).weight)
                assert getattr(model, head).weight.requires_grad


# ViT-B/16 with 100 classes: the head has 76,900 parameters, the feature extractor 85,798,656.
HEAD, D, BLOCKS = 769 * 100, 768, 12


def adapter_count(r):
    return BLOCKS * (2 * D * (D // r) + D // r + D)


COUNTS = {
    "linear": (fastpeft.Linear(), 0, 0.0895),
    "partial-1": (fastpeft.Partial(1), 7_087_872 + 2 * D, 8.345),
    "mlp-3": (fastpeft.MLPHead(3), 2 * (D * D + D + 2 * D), 1.449),
    "bias": (fastpeft.BitFit(), 102_912, 0.209),
    "adapter-8": (fastpeft.Adapter(8), adapter_count(8), 2.118),
    "adapter-64": (fastpeft.Adapter(64), adapter_count(64), 0.357),
    "adapter-256": (fastpeft.Adapter(256), adapter_count(256), 0.165),
    "shallow-1": (fastpeft.VPT(1, deep=False), D, 0.090),
    "shallow-200": (fastpeft.VPT(200, deep=False), 200 * D, 0.268),
    "deep-1": (fastpeft.VPT(1), BLOCKS * D, 0.100),
    "deep-200": (fastpeft.VPT(200), BLOCKS * 200 * D, 2.189),
    "lora-8": (fastpeft.LoRA(8), BLOCKS * 2 * 8 * 2 * D, None),
    "prefix-10": (fastpeft.PrefixTuning(10), BLOCKS * 2 * 10 * D, None),
    "serial-64": (fastpeft.SerialAdapter(64), BLOCKS * 2 * 2 * 64 * D, None),
}


@pytest.mark.parametrize("row", COUNTS)
def test_parameter_counts_are_the_papers(row):
    method, extra, percent = COUNTS[row]
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=100)
        fastpeft.patch(model, method)
    found = fastpeft.summary(model)
    assert found.backbone == 85_798_656
    assert found.head == HEAD
    assert found.trainable == HEAD + extra
    assert found.total == sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in fastpeft.trainable_parameters(model)) == HEAD + extra
    if percent is not None:
        assert abs(100 * found.share - percent) < 6e-4


def test_random_factors_start_as_their_papers_codes_do():
    model = fastpeft.patch(
        vit(embed_dim=256, num_heads=4), fastpeft.LoRA(16) + fastpeft.Adapter(2) + fastpeft.PrefixTuning(64)
    )
    block = model.blocks[0]
    bound = 1 / 256**0.5  # Kaiming-uniform with a = sqrt(5): the default of a linear layer of this many inputs
    for tensor in (block.lora.q.A, block.adapter.down.weight):
        assert 0.99 * bound < tensor.abs().max() <= bound
    for tensor in (block.lora.q.B, block.adapter.up.weight, block.adapter.up.bias, block.adapter.down.bias):
        assert not tensor.any()
    assert block.prefix.k.std().item() == pytest.approx(0.02, rel=0.05)
    again = fastpeft.patch(vit(embed_dim=256, num_heads=4), fastpeft.LoRA(16))
    assert not torch.equal(again.blocks[0].lora.q.A, block.lora.q.A)
