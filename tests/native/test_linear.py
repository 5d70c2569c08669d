"""Packed layers without a LayerNorm, adapters alone and MLPs between sums, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastpeft.native.block import Adapter, Linear, Mlp, Packs, Place, bottleneck, linear, mlp_branch
from tests.kernels.close import assert_close
from tests.native.amx import BF16, needs_amx

pytestmark = needs_amx

ROWS = ((1, 1), (3, 11), (2, 150))
D, OUT, RANK, HIDDEN = 96, 160, 6, 40


def layer(inputs: int, outputs: int, bias: bool = True):
    w = (torch.randn(outputs, inputs) / inputs**0.5).to(BF16)
    b = torch.randn(outputs).to(BF16) if bias else None
    return w, b, Packs().layer("layer", [w], [b], (None, None), None)


def leaf(*shape: int, scale: float = 1.0, dtype: torch.dtype = BF16) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(dtype).requires_grad_()


def check(function, inputs, reference):
    """Values and gradients of all inputs: `function` in bf16, `reference` in bf16 and float64."""
    results = []
    for call, dtype in ((function, None), (reference, None), (reference, torch.float64)):
        own = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
        y = call(*own)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(BF16)
        grads = torch.autograd.grad(y, own, weight.to(y.dtype))
        results.append([y.detach(), *grads])
    for index, (value, plain, exact) in enumerate(zip(*results, strict=True)):
        assert value.shape == exact.shape and value.dtype == plain.dtype
        # Sums of products of bf16 numbers, whatever the factors' own type is.
        assert_close(f"result {index}", value.to(BF16), plain.to(BF16), exact)


def cast(t, like):
    return t.to(like.dtype)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("sum_too", [None, BF16, torch.float32], ids=str)
@pytest.mark.parametrize("terms", [0, 2])
def test_linear(rows, sum_too, terms):
    """Its sum is in the format of what is added, too."""
    w, b, packed = layer(D, OUT)
    places = [Place(0, 64, 1.0), Place(64, OUT, 0.5)][:terms]
    factors = [leaf(*s, scale=0.2, dtype=torch.float32) for p in places for s in ((RANK, D), (p.stop - p.start, RANK))]
    given = [leaf(*rows, D)] + ([leaf(*rows, OUT, dtype=sum_too)] if sum_too else [])

    def ours(a, *rest):
        x, rest = (rest[0], rest[1:]) if sum_too else (None, rest)
        return linear(a, x, Linear(packed, tuple(places)), rest)

    def plain(a, *rest):
        x, rest = (rest[0], rest[1:]) if sum_too else (None, rest)
        y = F.linear(a, cast(w, a), cast(b, a))
        for index, place in enumerate(places):
            term = (a @ cast(rest[2 * index], a).T) @ cast(rest[2 * index + 1], a).T * place.scale
            y = y + F.pad(term, (place.start, OUT - place.stop))
        return y if x is None else x + y

    check(ours, [*given, *factors], plain)


@pytest.mark.parametrize("rows", ROWS)
def test_the_last_outputs_of_a_layer(rows):
    w, b, packed = layer(D, OUT)
    check(
        lambda a: linear(a, None, Linear(packed, start=64), []),
        [leaf(*rows, D)],
        lambda a: F.linear(a, cast(w, a)[64:], cast(b, a)[64:]),
    )


def adapted(f, down, down_bias, up, up_bias, scale, skip):
    h = F.gelu(F.linear(f, cast(down, f), cast(down_bias, f)))
    y = scale * F.linear(h, cast(up, f), cast(up_bias, f))
    return y + f if skip else y


def adapter_factors(width: int):
    shapes = ((HIDDEN, width), (HIDDEN,), (width, HIDDEN), (width,))
    return [leaf(*shape, scale=0.2, dtype=torch.float32) for shape in shapes]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("stream", [BF16, torch.float32])
@pytest.mark.parametrize("terms", [0, 1])
def test_linear_with_a_serial_adapter(rows, terms, stream):
    w, b, packed = layer(D, OUT)
    places = (Place(0, OUT, 2.0),)[:terms]
    factors = [leaf(RANK, D, scale=0.2, dtype=torch.float32), leaf(OUT, RANK, scale=0.2, dtype=torch.float32)]
    plan = Linear(packed, places, Adapter("serial", "gelu", 0.5))

    def plain(a, x, *rest):
        f = F.linear(a, cast(w, a), cast(b, a))
        if terms:
            f = f + 2.0 * (a @ cast(rest[0], a).T) @ cast(rest[1], a).T
        return x + adapted(f, *rest[2 * terms :], 0.5, True)

    check(
        lambda a, x, *rest: linear(a, x, plan, rest),
        [leaf(*rows, D), leaf(*rows, OUT, dtype=stream), *factors[: 2 * terms], *adapter_factors(OUT)],
        plain,
    )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("hidden_units", [HIDDEN, 2048])
def test_an_adapter_alone(rows, skip, hidden_units, monkeypatch):
    monkeypatch.setitem(globals(), "HIDDEN", hidden_units)
    check(
        lambda x, other, *rest: bottleneck(x, other, Adapter("parallel", "gelu", 0.5), skip, rest),
        [leaf(*rows, D), leaf(*rows, D), *adapter_factors(D)],
        lambda x, other, *rest: other + adapted(x, *rest, 0.5, skip),
    )


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("mode", [None, "serial", "parallel"])
@pytest.mark.parametrize("balanced", [False, True])
def test_mlp_without_a_layer_norm(rows, mode, balanced):
    (w1, b1, first), (w2, b2, last) = layer(D, OUT), layer(OUT, D)
    plan = Mlp(first, last, ((), ()), "gelu", None, True, balanced, Adapter(mode, "gelu", 1.0) if mode else None)
    if balanced and mode == "parallel":
        pytest.skip("nothing of its own")

    def plain(x, *rest):
        f = F.linear(F.gelu(F.linear(x, cast(w1, x), cast(b1, x))), cast(w2, x), cast(b2, x))
        if mode == "serial":
            return x + adapted(f, *rest, 1.0, True)
        return x + f + (adapted(x, *rest, 1.0, False) if mode else 0.0)

    check(lambda x, *rest: mlp_branch(x, plan, rest), [leaf(*rows, D), *(adapter_factors(D) if mode else [])], plain)
