"""The bottleneck adapter: values, its contribution alone, and every gradient against float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastpeft.kernels import adapter
from fastpeft.kernels._activation import CODES
from fastpeft.kernels._launch import recording
from fastpeft.ops.adapter import reference
from tests.kernels.close import CAP, assert_close, error
from tests.thinned import sampled, thinned

TYPES = (torch.float32, torch.float16)
NAMES = ("down_weight", "down_bias", "up_weight", "up_bias")
RESIDUALS = ("none", "skip", "other")


def draw(M, d, hidden, dtype, factors=None, bias=True):
    """x and the four factors, sized so that the contribution is as large as x."""
    factors = factors or dtype
    x = torch.randn(M, d).to(dtype)
    down, up = torch.randn(hidden, d) / d**0.5, torch.randn(d, hidden) / hidden**0.5
    biases = (0.5 * torch.randn(hidden), 0.5 * torch.randn(d)) if bias else (None, None)
    return x, tuple(None if t is None else t.to(factors) for t in (down, biases[0], up, biases[1]))


def plain(x, factors, activation, scale, kind, other, dy, dtype):
    """(y, contribution, gradients of x and the factors) by the reference in one precision."""
    x = x.detach().to(dtype).requires_grad_()
    # Masters stay masters: the reference rounds them to x's dtype as the kernel does.
    leaves = [
        None if t is None else (t.double() if dtype == torch.float64 else t.clone()).requires_grad_() for t in factors
    ]
    residual = {"none": None, "skip": x, "other": other.to(dtype)}[kind]
    y = reference(x, *leaves, activation, scale, residual)
    y.backward(dy.to(dtype))
    with torch.no_grad():
        alone = reference(x, *leaves, activation, scale, None)
    return y.detach(), alone, [x.grad, *(None if t is None else t.grad for t in leaves)]


def check(*args, **kwargs):
    """Forward, the contribution alone, and all gradients."""
    for name, *triple in compared(*args, **kwargs):
        assert_close(name, *triple)


def compared(x, factors, activation="gelu", scale=1.0, kind="none", dy=None, other=None):
    """(name, kernel's, plain PyTorch's, float64's) of everything."""
    other = torch.randn(x.shape).to(x.dtype) if other is None else other
    dy = torch.randn(x.shape).to(x.dtype) if dy is None else dy
    # Rounding masters to x's dtype is part of the operator, not an error of the kernel, which leaves biases in fp32.
    rounded = [t if t is None or t.dim() == 1 else t.to(x.dtype) for t in factors]
    exact_y, exact_alone, exact = plain(x, rounded, activation, scale, kind, other, dy, torch.float64)
    plain_y, plain_alone, baseline = plain(x, factors, activation, scale, kind, other, dy, x.dtype)
    residual = {"none": None, "skip": x, "other": other}[kind]
    y = adapter.forward(x, *factors, activation, scale, residual=residual)
    assert y.dtype == x.dtype and y.is_contiguous()
    yield "y", y, plain_y, exact_y
    alone = adapter.forward(x, *factors, activation, scale)
    yield "contribution", alone, plain_alone, exact_alone
    if residual is not None:
        rows = residual.double()
        yield "y - residual", (y - rows).to(x.dtype), (plain_y - rows).to(x.dtype), exact_alone
    gradients = adapter.backward(dy, x, *factors, activation, scale, skip=kind == "skip")
    assert gradients[0].dtype == x.dtype
    for name, got, ours, want, factor in zip(("x", *NAMES), gradients, baseline, exact, (x, *factors), strict=True):
        assert (got is None) == (factor is None), name
        if got is not None:
            assert got.dtype == factor.dtype and got.shape == factor.shape and got.is_contiguous(), name
            # A master's gradient is judged by the precision of what it is made of.
            yield f"d {name}", got.to(x.dtype), ours.to(x.dtype), want


SHAPES = list(itertools.product([1, 17, 65], [32, 100, 192, 384], [1, 8, 16, 64, 100]))


def check_shape(number, dtype):
    # Every other choice changes from shape to shape at a pace of its own.
    activation = list(CODES)[number % len(CODES)]
    kind, scale = RESIDUALS[number // 2 % 3], (1.0, 0.5, 4.0)[number // 3 % 3]
    factors = (dtype, torch.float32)[number // 4 % 2]
    M, _, hidden = SHAPES[number]
    # One hidden unit's rounding is that of all of x's gradient, and luck: then many draws are judged as one.
    results = {}
    for _ in range(1 if M * hidden >= 8 else 16):
        x, drawn = draw(*SHAPES[number], dtype, factors, bias=number % 5 > 0)
        for name, *triple in compared(x, drawn, activation, scale, kind):
            results.setdefault(name, []).append([t.flatten() for t in triple])
    for name, triples in results.items():
        assert_close(name, *map(torch.cat, zip(*triples, strict=True)))


def first_type(number):
    """One of the types for the quick test; the neighbours of a shape in every direction get the other one."""
    return (number % 5 + number // 5 % 4 + number // 20) % 2


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("number", thinned(range(len(SHAPES)), 7), ids=[f"{M}-{d}-{hidden}" for M, d, hidden in SHAPES])
def test_shapes(number):
    check_shape(number, TYPES[first_type(number)])


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("number", range(len(SHAPES)), ids=[f"{M}-{d}-{hidden}" for M, d, hidden in SHAPES])
def test_shapes_in_the_other_type(number):
    check_shape(number, TYPES[1 - first_type(number)])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", CODES)
def test_activations(activation, dtype):
    x, factors = draw(33, 48, 24, dtype)
    check(3 * x, factors, activation, 1.0, "skip")


@pytest.mark.parametrize("kind", RESIDUALS)
@pytest.mark.parametrize("scale", [1, 0.5, 4.0, -1.5, 0.0])
def test_scales_and_residuals(scale, kind):
    if scale == 0.0:
        x, factors = draw(17, 48, 8, torch.float32)
        y = adapter.forward(x, *factors, "relu", scale, residual=x if kind == "skip" else None)
        assert torch.equal(y, x if kind == "skip" else torch.zeros_like(x))
        dx, *rest = adapter.backward(x, x, *factors, "relu", scale, skip=kind == "skip")
        assert torch.equal(dx, y) and not any(t.any() for t in rest)
        return
    for dtype in TYPES:
        x, factors = draw(17, 48, 8, dtype)
        check(x, factors, "relu", scale, kind)


@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=2)))
def test_each_bias_alone(given):
    x, factors = draw(17, 64, 16, torch.float16)
    factors = [t if i % 2 == 0 or given[i // 2] else None for i, t in enumerate(factors)]
    check(x, factors, "silu", 2.0, "other")


@pytest.mark.parametrize("masters", list(itertools.product([False, True], repeat=4)))
def test_each_factor_may_be_a_master(masters):
    x, factors = draw(17, 64, 16, torch.float16, torch.float32)
    factors = [t if master else t.half() for t, master in zip(factors, masters, strict=True)]
    check(x, factors, "gelu", 0.5, "skip")


def test_masters_are_rounded_once():
    """As if they had been rounded before."""
    x, (down, _, up, _) = draw(17, 64, 16, torch.float16, torch.float32)
    factors, rounded = (down, None, up, None), (down.half(), None, up.half(), None)
    assert torch.equal(adapter.forward(x, *factors, "gelu", 1.0), adapter.forward(x, *rounded, "gelu", 1.0))
    masters = adapter.backward(x, x, *factors, "gelu", 1.0, skip=False)
    for of_master, of_rounded in zip(masters, adapter.backward(x, x, *rounded, "gelu", 1.0, skip=False), strict=True):
        assert (of_master is None and of_rounded is None) or torch.equal(of_master.half(), of_rounded)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", TYPES)
def test_strided_rows(dtype):
    _, factors = draw(17, 40, 24, dtype)
    wide = torch.randn(2, 40, 64).to(dtype)
    for x, other in (
        (wide[0, :17, :40], wide[1, ::2][:17, 8:48]),
        (wide[0, 20:37, 16:56], wide[:1, 0, :40].expand(17, 40)),
        (wide[1, :34:2, :40], torch.randn(17, 40).to(dtype)),
    ):
        assert adapter.reasons(x, *factors, "gelu", 1.0, residual=other) == []
        check(x, factors, "gelu", 0.5, "other", dy=other, other=other)
        check(other, factors, "gelu", 0.5, "skip", dy=x)


def test_strided_factors():
    x, _ = draw(17, 40, 24, torch.float32)
    down, up, bias = torch.randn(24, 50)[:, :40], torch.randn(40, 30)[:, :24], torch.randn(24)
    assert adapter.reasons(x, down, bias, up, None, "gelu", 1.0) == []
    want = reference(x.double(), down.double(), bias.double(), up.double(), None, "gelu", 1.0, None)
    assert error(adapter.forward(x, down, bias, up, None, "gelu", 1.0), want) < 1e-6
    contiguous = adapter.backward(x, x, down.contiguous(), bias, up.contiguous(), None, "gelu", 1.0, skip=False)
    for strided, same in zip(
        adapter.backward(x, x, down, bias, up, None, "gelu", 1.0, skip=False), contiguous, strict=True
    ):
        assert (strided is None and same is None) or torch.equal(strided, same)


def test_gradients_of_any_layout():
    x, factors = draw(17, 40, 24, torch.float32)
    for dy in (torch.randn(1).expand(17, 40), torch.randn(40, 17).t(), torch.randn(40).expand(17, 40)):
        check(x, factors, "gelu", 1.0, "skip", dy=dy)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=2)))
def test_only_what_is_needed(needs, biases, monkeypatch):
    needs_x, needs_weights = needs
    x, factors = draw(65, 48, 24, torch.float32, bias=biases)
    dy = torch.randn(65, 48)
    everything = adapter.backward(dy, x, *factors, "gelu", 1.0, skip=True)
    made, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: made.append(size) or empty(*size, **options))
    some = adapter.backward(dy, x, *factors, "gelu", 1.0, skip=True, needs_x=needs_x, needs_weights=needs_weights)
    wanted = [needs_x] + [needs_weights and factor is not None for factor in factors]
    for want, value, full in zip(wanted, some, everything, strict=True):
        assert (value is not None) == want
        assert value is None or torch.equal(value, full)
    # dx; h, dz and the sums over rows of each factor that there is.
    assert len(made) == needs_x + needs_weights * (4 + 2 * biases)


def test_equal_inputs_give_equal_bits():
    x, factors = draw(200, 48, 24, torch.float16, torch.float32)
    dy = torch.randn(200, 48).half()

    def run():
        y = adapter.forward(x, *factors, "gelu", 0.5, residual=x)
        return y, *adapter.backward(dy, x, *factors, "gelu", 0.5, skip=True)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_inputs_are_left_as_they_are():
    x, factors = draw(33, 48, 24, torch.float16)
    dy = torch.randn(33, 48).half()
    before = [t.clone() for t in (x, dy, *factors)]
    adapter.forward(x, *factors, "gelu", 0.5, residual=x)
    adapter.backward(dy, x, *factors, "gelu", 0.5, skip=True)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, dy, *factors), strict=True))


def test_padding_stays_out_of_the_sums():
    """Neither rows behind the last nor hidden units behind the last may count, though act'(0) is not 0."""
    x, factors = draw(17, 40, 3, torch.float32)
    wide = torch.full((64, 64), float("nan"))
    wide[:17, :40] = x
    check(wide[:17, :40], factors, "gelu", 1.0, "skip")


def test_no_rows():
    x, factors = draw(0, 32, 8, torch.float32)
    assert adapter.forward(x, *factors, "gelu", 1.0).shape == (0, 32)
    dx, *rest = adapter.backward(x, x, *factors, "gelu", 1.0, skip=True)
    assert dx.shape == (0, 32)
    assert all(g.shape == t.shape and not g.any() for g, t in zip(rest, factors, strict=True))


def test_refusals():
    x, (down, down_bias, up, up_bias) = draw(4, 32, 8, torch.float16)
    settings = ("gelu", 1.0)
    for expected, arguments, options in (
        ("not rows of", (x[None], down, down_bias, up, up_bias, *settings), {}),
        ("float64", (x.double(), *(t.double() for t in (down, down_bias, up, up_bias)), *settings), {}),
        ("the activation 'mish' is not one of", (x, down, down_bias, up, up_bias, "mish", 1.0), {}),
        ("257 hidden units", (x, x.new_zeros(257, 32), None, x.new_zeros(32, 257), None, *settings), {}),
        ("down_weight is", (x, down.double(), down_bias, up, up_bias, *settings), {}),
        ("up_weight is", (x, down, down_bias, up[:5], up_bias, *settings), {}),
        ("down_bias is", (x, down, down_bias[:5], up, up_bias, *settings), {}),
        ("columns of up_weight do not", (x, down, None, up.t().contiguous().t(), None, *settings), {}),
        ("columns of x do not", (x.t().contiguous().t(), down, None, up, None, *settings), {}),
        ("the residual is", (x, down, None, up, None, *settings), {"residual": x.float()}),
        ("the residual is", (x, down, None, up, None, *settings), {"residual": x[:2]}),
        ("columns of the residual", (x, down, None, up, None, *settings), {"residual": x.t().contiguous().t()}),
    ):
        found = adapter.reasons(*arguments, **options)
        assert len(found) == 1 and expected in found[0], (expected, found)
    assert adapter.reasons(x, down, down_bias, up, up_bias, *settings, residual=x) == []
    meta = torch.empty(4, 32, dtype=torch.bfloat16, device="meta")
    with recording(75):
        assert "bfloat16 needs" in adapter.reasons(meta, meta[:2], None, meta[:2].t().contiguous(), None, *settings)[0]


def test_the_comparison_rejects_what_the_total_would_hide():
    """A contribution of 1% of the residual that is half wrong passes as a total and fails alone."""
    x, factors = draw(65, 96, 16, torch.float16)
    other = 100 * torch.randn(65, 96).half()
    exact_y, exact_alone, _ = plain(x, factors, "gelu", 1.0, "other", other, x, torch.float64)
    plain_y, plain_alone, _ = plain(x, factors, "gelu", 1.0, "other", other, x, torch.float16)
    wrong = adapter.forward(x, *factors, "gelu", 0.5)
    assert error(wrong + other, exact_y) < CAP[torch.float16]
    with pytest.raises(AssertionError, match="contribution: relative error"):
        assert_close("contribution", wrong, plain_alone, exact_alone)
    assert_close("y", adapter.forward(x, *factors, "gelu", 1.0, residual=other), plain_y, exact_y)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "M, d, hidden, kind", sampled([(197, 768, 96, "skip"), (257, 1280, 3, "other"), (197, 768, 256, "none")], 3)
)
def test_whole_images(M, d, hidden, kind, dtype):
    x, factors = draw(M, d, hidden, dtype, torch.float32)
    check(x, factors, "gelu", 0.5, kind)
