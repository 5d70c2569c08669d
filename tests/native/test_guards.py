"""What the matrix unit is not given, or is given in another form: nothing here runs on it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastpeft import _native
from fastpeft.engine import branches, packed
from fastpeft.native import block, blocked, low_rank, operand, packs
from fastpeft.native.bottleneck import Adapter, Bottleneck
from fastpeft.native.gemm import Matrix, pack
from fastpeft.native.linear import Linear, linear
from fastpeft.native.vector import prompt_attention

BF16 = torch.bfloat16


@pytest.fixture
def amx(monkeypatch):
    """As on a CPU that has it."""
    monkeypatch.setattr(_native, "cpu_level", lambda: "amx")


def test_a_block_that_can_run(amx):
    x = torch.empty(2, 3, 64, dtype=BF16)
    assert block.reasons(x, (64, 128), 32, (torch.empty(128, 64), torch.empty(64, 64, dtype=BF16))) == []


@pytest.mark.parametrize("shape", [(0, 3, 64), (2, 0, 64)])
def test_no_rows(amx, shape):
    x = torch.empty(shape, dtype=BF16)
    assert block.reasons(x, (64,), None) == ["there are no rows"]
    frozen = SimpleNamespace(weights=[torch.empty(64, 64)])
    assert not branches.pays(x, frozen) and branches.pays(torch.empty(1, 1, 64), frozen)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_of_other_formats(amx, dtype):
    x, other = torch.empty(2, 3, 64, dtype=BF16), torch.empty(64, 64, dtype=dtype)
    found = block.reasons(x, (64,), None, (torch.empty(64, 64), other))
    assert found == [f"weights must be bfloat16 or float32, some are {str(dtype)[6:]}"]
    with pytest.raises(ValueError, match="a weight must be in bfloat16 or float32"):
        pack(other)
    with pytest.raises(ValueError, match="a matrix must be in bfloat16 or float32"):
        Matrix.of(other)
    with pytest.raises(ValueError, match="a blocked matrix must be in bfloat16"):
        Matrix.of(blocked.empty(32, 32, dtype))


def test_rows_that_are_not_in_one_piece():
    with pytest.raises(ValueError, match="rows in one piece"):
        Matrix.of(torch.empty(64, 32).t())


def test_a_trained_weight_is_read_in_rows_and_as_it_is_now(monkeypatch):
    seen = []

    def call(source, *_, **__):
        assert source.stride(1) == 1
        seen.append(source.clone())

    monkeypatch.setattr(operand, "_call", call)
    weight = nn.Parameter(torch.randn(64, 32).t())
    layer = packs.Packs().layer("layer", [weight], [None], (None, None), None)
    assert isinstance(layer, packs.Live)
    layer.make()
    weight.data.mul_(2)
    _ = layer.backward
    assert torch.equal(seen[0] * 2, weight) and torch.equal(seen[1], weight)
    # Rows with gaps between them are read where they are.
    wide = torch.randn(32, 100)[:, :64]
    monkeypatch.setattr(operand, "_call", lambda source, *_, **__: seen.append(source))
    operand.weight_forward(wide, None, None)
    assert seen[-1] is wide


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float32, BF16])
def test_factors_of_an_adapter(dtype):
    down, up = torch.randn(8, 64).to(dtype), torch.randn(8, 64).to(dtype).t()
    made = Bottleneck(Adapter("serial", "gelu", 1.0), [down, None, up, None], None)
    for found, given in ((made._down, down), (made._up, up)):
        assert found.dtype in (BF16, torch.float32) and found.is_contiguous()
        assert torch.equal(found, given.to(found.dtype))


def test_a_model_made_in_inference_mode(monkeypatch):
    made = []
    monkeypatch.setattr(packs, "pack", lambda w, *_: made.append(w))
    with torch.inference_mode():
        weight, bias = torch.randn(64, 32), torch.randn(64)
    mine = packs.Packs()
    for _ in range(2):
        assert isinstance(mine.layer("layer", [weight], [bias], (None, None), None), packs.Layer)
    assert len(made) == 1
    mine.layer("layer", [weight.clone()], [bias], (None, None), None)
    assert len(made) == 2


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_a_residual_stream_keeps_its_format(monkeypatch, dtype):
    given = {}

    def forward(layer, low, a, c, rows, **options):
        given.update(options, c=c)
        c.zero_()

    monkeypatch.setattr(low_rank, "forward", forward)
    plan = Linear(SimpleNamespace(weight=torch.empty(96, 64)))
    a, x = torch.randn(2, 3, 64).to(BF16), torch.randn(2, 3, 96).to(dtype)
    assert linear(a, x, plan, []).dtype == given["c"].dtype == given["other"].dtype == dtype
    assert linear(a, None, plan, []).dtype == BF16


@pytest.mark.parametrize(
    "dtype, mode, served",
    [
        (BF16, "", True),
        (BF16, "parallel", True),
        (torch.float32, "", True),
        (torch.float32, "serial", True),
        (torch.float32, "parallel", False),
        (torch.float64, "", False),
    ],
)
def test_sums_in_other_formats_than_the_products(monkeypatch, dtype, mode, served):
    layers = SimpleNamespace(places=lambda module: (), factors=[])
    adapter = SimpleNamespace(act="gelu", scale=1.0, skip=False) if mode else None
    y = torch.empty(0)
    module = SimpleNamespace(
        Linear=lambda *_: None, linear=lambda *_: y, Adapter=lambda *_: None, bottleneck=lambda *_: y
    )
    monkeypatch.setattr(packed, "_serve", lambda *_: (module, layers))
    monkeypatch.setattr(packed, "_adapter", lambda *_: (mode, adapter))
    monkeypatch.setattr(packed, "_factors", lambda *_: [])
    monkeypatch.setattr(packed, "packer", lambda *_: lambda *_: None)
    a, x = torch.randn(2, 3, 64).to(BF16), torch.randn(2, 3, 64).to(dtype)
    assert (packed.behind(None, "o", "attn", a, x) is y) == served


@pytest.mark.parametrize(
    "lengths",
    [torch.tensor([1, 2]), torch.tensor([[1, 2]], dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int32)[:, 0]],
    ids=["int64", "shape", "strides"],
)
def test_lengths_that_are_read_otherwise(lengths):
    q = torch.randn(2, 1, 4, 32).to(BF16)
    found = prompt_attention.reasons(q, q, q, scale=1.0, lengths=lengths)
    assert any("lengths must be contiguous int32 (2,)" in reason for reason in found)
