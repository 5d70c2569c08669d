"""LayerNorm with the residual sum before it: values and every gradient against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from fastpeft.kernels import layer_norm
from fastpeft.kernels._launch import recording
from tests.kernels.close import assert_close, error

EPS = 1e-6
TYPES = (torch.float32, torch.float16)


def plain(x, branch, gamma, weight, bias, dtype):
    """The equation in one precision: (y, s, leaves by name)."""
    leaves = {"x": x, "branch": branch, "weight": weight, "bias": bias}
    leaves = {k: None if t is None else t.detach().to(dtype).requires_grad_() for k, t in leaves.items()}
    s = leaves["x"]
    if branch is not None:
        s = s + (leaves["branch"] if gamma is None else leaves["branch"] * gamma.to(dtype))
    return F.layer_norm(s, s.shape[-1:], leaves["weight"], leaves["bias"], EPS), s, leaves


def plain_gradients(x, branch, gamma, weight, bias, dy, ds, dtype):
    y, s, leaves = plain(x, branch, gamma, weight, bias, dtype)
    loss = (y * dy.to(dtype)).sum() if ds is None else (y * dy.to(dtype)).sum() + (s * ds.to(dtype)).sum()
    loss.backward()
    return y.detach(), s.detach(), {k: None if t is None else t.grad for k, t in leaves.items()}


def draw(shape, dtype, branch=True, gamma=True, affine=True, parameters=None, offset=0.0):
    d = shape[-1]
    parameters = parameters or dtype
    x = (torch.randn(shape) + offset).to(dtype)
    branch = torch.randn(shape).to(dtype) if branch else None
    gamma = (0.5 + torch.rand(d)).to(parameters) if gamma else None
    weight = (1 + 0.3 * torch.randn(d)).to(parameters) if affine else None
    bias = torch.randn(d).to(parameters) if affine else None
    return x, branch, gamma, weight, bias


def check(x, branch, gamma, weight, bias, dy=None, ds=None):
    """Forward and all gradients."""
    dy = torch.randn(x.shape).to(x.dtype) if dy is None else dy
    y, s, mean, rstd = layer_norm.forward(x, weight, bias, EPS, branch=branch, gamma=gamma)
    exact_y, exact_s, exact = plain_gradients(x, branch, gamma, weight, bias, dy, ds, torch.float64)
    plain_y, plain_s, baseline = plain_gradients(x, branch, gamma, weight, bias, dy, ds, x.dtype)
    assert y.dtype == s.dtype == x.dtype and mean.dtype == rstd.dtype == torch.float32
    assert (s is x) == (branch is None)
    assert_close("s", s, plain_s, exact_s)
    assert_close("y", y, plain_y, exact_y)
    rows = s.double().reshape(-1, x.shape[-1])
    torch.testing.assert_close(mean.double(), rows.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rstd.double(), (rows.var(1, correction=0) + EPS).rsqrt(), rtol=1e-5, atol=0)
    dx, dbranch, dbias, dweight = layer_norm.backward(
        dy,
        s,
        weight,
        mean,
        rstd,
        ds=ds,
        gamma=gamma,
        needs_branch=branch is not None,
        needs_bias=bias is not None,
        needs_weight=weight is not None,
        bias_dtype=torch.float32,
    )
    assert dx.dtype == x.dtype
    assert_close("dx", dx, baseline["x"], exact["x"])
    if branch is None:
        assert dbranch is None
    else:
        assert (dbranch is dx) == (gamma is None) and dbranch.dtype == x.dtype
        assert_close("dbranch", dbranch, baseline["branch"], exact["branch"])
    assert (dweight is None, dbias is None) == (weight is None, bias is None)
    if weight is not None:
        assert dweight.dtype == weight.dtype
        # Sums in fp32 over rows of lower precision are judged by what that precision allows.
        assert_close("dweight", dweight.to(x.dtype), baseline["weight"], exact["weight"])
    if bias is not None:
        assert dbias.dtype == torch.float32
        assert error(dbias, exact["bias"]) < 1e-6


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("d", [1, 32, 100, 384, 768, 1280])
@pytest.mark.parametrize("rows", [1, 3, 65])
def test_values_and_gradients(rows, d, dtype):
    if d == 1:
        # Every y is the bias and dx is ds: the rest is rounding, of which no two ways agree.
        x, branch, gamma, weight, bias = draw((rows, 1), dtype)
        y, s, mean, rstd = layer_norm.forward(x, weight, bias, EPS, branch=branch, gamma=gamma)
        dy, ds = torch.randn(2, rows, 1).to(dtype)
        assert torch.equal(y, bias.expand(rows, 1)) and torch.equal(mean, s.float()[:, 0])
        dx, _, _, dweight = layer_norm.backward(dy, s, weight, mean, rstd, ds=ds, needs_weight=True)
        assert torch.equal(dx, ds) and dweight.item() == 0.0
        return
    check(*draw((rows, d), dtype), ds=torch.randn(rows, d).to(dtype))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("parameters", [None, torch.float32])
@pytest.mark.parametrize(("branch", "gamma"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_what_is_given(branch, gamma, affine, residual, parameters):
    ds = torch.randn(2, 17, 100).half() if residual else None
    check(*draw((2, 17, 100), torch.float16, branch, gamma, affine, parameters), ds=ds)


@pytest.mark.parametrize("dtype", TYPES)
def test_weight_without_bias_and_bias_without_weight(dtype):
    x, branch, gamma, weight, bias = draw((5, 33), dtype)
    check(x, branch, gamma, weight, None)
    dy = torch.randn(5, 33).to(dtype)
    y, s, mean, rstd = layer_norm.forward(x, None, bias, EPS)
    exact = plain_gradients(x, None, None, None, bias, dy, None, torch.float64)
    baseline = plain_gradients(x, None, None, None, bias, dy, None, dtype)
    dx, _, dbias, dweight = layer_norm.backward(
        dy, s, None, mean, rstd, needs_bias=True, needs_weight=True, bias_dtype=torch.float32
    )
    assert dweight is None
    assert_close("y", y, baseline[0], exact[0])
    assert_close("dx", dx, baseline[2]["x"], exact[2]["x"])
    assert error(dbias, exact[2]["bias"]) < 1e-6


def test_bfloat16():
    check(*draw((3, 7, 96), torch.bfloat16), ds=torch.randn(3, 7, 96).bfloat16())


@pytest.mark.parametrize("offset", [100.0, -1000.0])
def test_a_large_mean_costs_no_more_than_in_plain_pytorch(offset):
    x, branch, gamma, weight, bias = draw((9, 384), torch.float32, offset=offset)
    check(x, branch, gamma, weight, bias, ds=torch.randn(9, 384))


def test_rows_without_variance_are_finite():
    x = torch.full((3, 64), 7.0)
    y, s, mean, rstd = layer_norm.forward(x, None, None, EPS)
    assert torch.equal(y, torch.zeros(3, 64)) and torch.equal(mean, torch.full((3,), 7.0))
    dx, *_ = layer_norm.backward(torch.randn(3, 64), s, None, mean, rstd)
    assert dx.isfinite().all()


def layouts(shape, dtype):
    """The same shape in memory of several layouts."""
    B, N, d = shape
    wide = torch.randn(B, N + 3, d + 5).to(dtype)
    yield "first rows", torch.randn(B, N + 3, d).to(dtype)[:, :N]
    yield "first columns", wide[:, :N, :d]
    yield "every second row", torch.randn(B, 2 * N, d).to(dtype)[:, ::2]
    yield "rows before samples", torch.randn(N, B, d).to(dtype).transpose(0, 1)
    yield "one sample repeated", torch.randn(1, N, d).to(dtype).expand(B, N, d)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", TYPES)
def test_strided_inputs_are_read_where_they_lie(dtype):
    shape = (3, 5, 48)
    drawn = list(layouts(shape, dtype))
    for (name, x), (_, other) in zip(drawn, drawn[-1:] + drawn[:-1], strict=True):
        _, _, gamma, weight, bias = draw(shape, dtype)
        assert layer_norm.reasons(x, weight, bias, EPS, branch=other, gamma=gamma) == [], name
        check(x, other, gamma, weight, bias, dy=other, ds=x)
        check(x, None, None, weight, bias, dy=other, ds=x)


def test_inputs_are_not_copied(monkeypatch):
    x, weight = torch.randn(3, 9, 48)[:, :5], torch.ones(48)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda *_: pytest.fail("copied"))
    y, s, mean, rstd = layer_norm.forward(x, weight, weight, EPS, branch=x)
    layer_norm.backward(x, s, weight, mean, rstd, ds=x)
    assert y.is_contiguous() and s.is_contiguous()


def test_gradients_of_any_layout():
    x, _, _, weight, bias = draw((2, 3, 4, 32), torch.float32, branch=False, gamma=False)
    for dy in (
        torch.randn(1).expand(x.shape),
        torch.randn(2, 3, 32, 4).transpose(2, 3),
        torch.randn(4, 3, 2, 32).transpose(0, 2),
    ):
        check(x, None, None, weight, bias, dy=dy, ds=dy)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)))
def test_only_what_is_needed(needs, monkeypatch):
    needs_x, needs_branch, needs_bias, needs_weight = needs
    x, branch, gamma, weight, bias = draw((5, 64), torch.float32)
    dy, ds = torch.randn(2, 5, 64)
    _, s, mean, rstd = layer_norm.forward(x, weight, bias, EPS, branch=branch, gamma=gamma)
    everything = layer_norm.backward(
        dy, s, weight, mean, rstd, ds=ds, gamma=gamma, needs_branch=True, needs_bias=True, needs_weight=True
    )
    made, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: made.append(size) or empty(*size, **options))
    some = layer_norm.backward(
        dy,
        s,
        weight,
        mean,
        rstd,
        ds=ds,
        gamma=gamma,
        needs_x=needs_x,
        needs_branch=needs_branch,
        needs_bias=needs_bias,
        needs_weight=needs_weight,
    )
    for need, value, full in zip(needs, some, everything, strict=True):
        assert (value is not None) == need
        assert value is None or torch.allclose(value, full, rtol=1e-6, atol=1e-6)
    assert len(made) == sum(needs)


def test_the_branch_alone_can_be_asked_for():
    x, branch, _, weight, bias = draw((5, 64), torch.float32, gamma=False)
    _, s, mean, rstd = layer_norm.forward(x, weight, bias, EPS, branch=branch)
    dy = torch.randn(5, 64)
    dx, dbranch, *_ = layer_norm.backward(dy, s, weight, mean, rstd, needs_x=False, needs_branch=True)
    assert dx is None and torch.equal(dbranch, layer_norm.backward(dy, s, weight, mean, rstd)[0])


@pytest.mark.parametrize("parameters", TYPES)
def test_type_of_dbias(parameters):
    x, _, _, weight, bias = draw((5, 64), torch.float16, parameters=parameters)
    for given in (weight, None):
        _, s, mean, rstd = layer_norm.forward(x, given, bias, EPS)
        for asked, expected in ((None, x.dtype if given is None else parameters), *((t, t) for t in TYPES)):
            dbias = layer_norm.backward(x, s, given, mean, rstd, needs_bias=True, bias_dtype=asked)[2]
            assert dbias.dtype == expected
            assert error(dbias, x.double().sum(0)) < torch.finfo(expected).eps


def test_equal_inputs_give_equal_bits():
    x, branch, gamma, weight, bias = draw((130, 100), torch.float16)
    dy = torch.randn(130, 100).half()

    def run():
        y, s, mean, rstd = layer_norm.forward(x, weight, bias, EPS, branch=branch, gamma=gamma)
        options = {"gamma": gamma, "needs_branch": True, "needs_bias": True, "needs_weight": True}
        return (y, s, mean, rstd, *layer_norm.backward(dy, s, weight, mean, rstd, **options))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_inputs_are_left_as_they_are():
    x, branch, gamma, weight, bias = draw((7, 40), torch.float16)
    dy = torch.randn(7, 40).half()
    before = [t.clone() for t in (x, branch, gamma, weight, bias, dy)]
    _, s, mean, rstd = layer_norm.forward(x, weight, bias, EPS, branch=branch, gamma=gamma)
    kept = s.clone()
    layer_norm.backward(dy, s, weight, mean, rstd, ds=dy, gamma=gamma, needs_branch=True, needs_bias=True)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, branch, gamma, weight, bias, dy), strict=True))
    assert torch.equal(s, kept)


def test_no_rows():
    x, weight = torch.empty(0, 5, 32), torch.ones(32)
    y, s, mean, rstd = layer_norm.forward(x, weight, weight, EPS)
    assert y.shape == x.shape and mean.shape == (0,)
    dx, _, dbias, dweight = layer_norm.backward(y, s, weight, mean, rstd, needs_bias=True, needs_weight=True)
    assert dx.shape == x.shape and not dbias.any() and not dweight.any() and dbias.shape == dweight.shape == (32,)


def test_refusals():
    x, weight = torch.randn(4, 32), torch.ones(32)
    for expected, arguments, options in (
        ("columns, not 1 to 4096", (torch.randn(2, 4097), None, None, EPS), {}),
        ("float64", (x.double(), None, None, EPS), {}),
        ("the branch is", (x, None, None, EPS), {"branch": x[:2]}),
        ("the branch is", (x, None, None, EPS), {"branch": x.half()}),
        ("side by side", (torch.randn(32, 4).t(), None, None, EPS), {}),
        ("side by side", (torch.randn(2, 3, 2, 32).transpose(0, 2), None, None, EPS), {}),
        ("weight is", (x, weight.half(), None, EPS), {}),
        ("bias is", (x, None, weight[:5], EPS), {}),
        ("not contiguous", (x, torch.ones(64)[::2], None, EPS), {}),
    ):
        found = layer_norm.reasons(*arguments, **options)
        assert len(found) == 1 and expected in found[0], (expected, found)
    assert layer_norm.reasons(x, weight, weight, EPS, branch=x, gamma=weight) == []
    meta = torch.empty(4, 32, dtype=torch.bfloat16, device="meta")
    with recording(75):
        assert "bfloat16 needs" in layer_norm.reasons(meta, None, None, EPS)[0]


def test_the_comparison_rejects_a_missing_term():
    x, _, _, weight, bias = draw((65, 100), torch.float16, branch=False)
    dy = torch.randn(65, 100).half()
    _, s, mean, rstd = layer_norm.forward(x, weight, bias, EPS)
    dx, *_ = layer_norm.backward(dy, s, weight, mean, rstd)
    exact = plain_gradients(x, None, None, weight, bias, dy, None, torch.float64)[2]["x"]
    baseline = plain_gradients(x, None, None, weight, bias, dy, None, torch.float16)[2]["x"]
    assert_close("dx", dx, baseline, exact)
    without_mean = dx + rstd[:, None] * (dy * weight).float().mean(1, keepdim=True)
    with pytest.raises(AssertionError, match="dx: relative error"):
        assert_close("dx", without_mean.half(), baseline, exact)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("d", [16, 64, 192, 1024, 2050, 4096])
@pytest.mark.parametrize("tokens", [197, 257])
def test_whole_images(tokens, d, dtype):
    check(*draw((2, tokens, d), dtype), ds=torch.randn(2, tokens, d).to(dtype))
