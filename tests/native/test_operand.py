"""Matrices in the forms of the matrix unit, and the gradients of weights that are made of them."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from fastpeft.native import blocked
from fastpeft.native.gemm import pack
from fastpeft.native.layer_norm import affine_layer_norm_backward
from fastpeft.native.operand import column_sums, outer, weight_backward, weight_forward
from tests.kernels.close import assert_close, error
from tests.native.amx import BF16, both_layouts, needs_amx

pytestmark = needs_amx

ROWS = (1, 31, 32, 33, 77, 1100)
EPSILON = 1e-6


@pytest.mark.parametrize("dtype", (BF16, torch.float32))
@pytest.mark.parametrize("out, width", [(32, 32), (96, 64), (64, 160)])
def test_weights_are_packed_as_one_number_after_another(out, width, dtype):
    w = torch.randn(out, width).to(dtype)
    columns, rows, vector = torch.rand(width) + 0.5, torch.rand(out) + 0.5, torch.randn(width)
    for column_scale, row_scale in itertools.product((None, columns), (None, rows)):
        forward, dots = weight_forward(w, column_scale, row_scale, vector)
        assert torch.equal(forward.data, pack(w, column_scale, row_scale).data)
        assert error(dots, w.double() @ vector.double()) < 1e-6
        backward = weight_backward(w, column_scale, row_scale)
        assert torch.equal(backward.data, pack(w.t(), row_scale, column_scale).data)
        # Whichever way it lies.
        other = w.t().contiguous().t()
        assert torch.equal(weight_forward(other, column_scale, row_scale)[0].data, forward.data)
        assert torch.equal(weight_backward(other, column_scale, row_scale).data, backward.data)


@pytest.mark.parametrize("threads", (1, 2, 5))
@pytest.mark.parametrize("rows", ROWS)
def test_sums_over_rows(rows, threads):
    x, scale = torch.randn(rows, 96).to(BF16), torch.randn(96)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name, t in both_layouts(x).items():
            assert error(column_sums(t, rows), x.double().sum(0)) < 1e-5, name
            assert error(column_sums(t, rows, scale), (x.double() * scale).sum(0)) < 1e-5, name
        assert error(column_sums(x.float(), rows), x.double().sum(0)) < 1e-5
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("out, width", [(64, 96), (32, 1056)])
def test_gradient_of_a_weight(rows, out, width):
    dy, x, gamma = torch.randn(rows, out).to(BF16), torch.randn(rows, width).to(BF16), torch.randn(out)
    exact = (dy.double() * gamma.double()).T @ x.double()
    plain = (dy * gamma.to(BF16)).T @ x
    for (name, a), (other, b) in itertools.product(both_layouts(dy).items(), both_layouts(x).items()):
        product, sums = outer(a, b, rows, BF16, gamma)
        assert_close(f"{name}, {other}", product, plain, exact)
        assert error(sums, (dy.double() * gamma).sum(0)) < 1e-5
    wide, _ = outer(dy.float(), x.float(), rows, torch.float32)
    assert_close("fp32", wide.to(BF16), dy.T @ x, dy.double().T @ x.double())


@pytest.mark.parametrize("affine", (True, False))
def test_gradient_of_a_weight_behind_a_layer_norm(affine):
    rows, out, width = 77, 64, 96
    dy, x = torch.randn(rows, out).to(BF16), (torch.randn(rows, width) * 3 + 1).to(BF16)
    scale, shift = (torch.rand(width) + 0.5, torch.randn(width)) if affine else (None, None)
    statistics = torch.stack((x.float().mean(1), (x.float().var(1, correction=0) + EPSILON).rsqrt()))
    wide = [None if t is None else t.double() for t in (scale, shift)]
    exact = dy.double().T @ F.layer_norm(x.double(), (width,), *wide, EPSILON)
    narrow = [None if t is None else t.to(BF16) for t in (scale, shift)]
    plain = dy.T @ F.layer_norm(x, (width,), *narrow, EPSILON)
    for name, t in both_layouts(x).items():
        product, _ = outer(dy, t, rows, BF16, None, statistics, scale, shift)
        assert_close(name, product, plain, exact)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", (BF16, torch.float32))
def test_backward_of_a_layer_norm_that_is_trained(rows, dtype):
    width = 96
    x = (torch.randn(rows, width) * 2 + 1).to(dtype)
    dy, dsum = torch.randn(rows, width).to(BF16), torch.randn(rows, width).to(dtype)
    weight, bias = torch.randn(width), torch.randn(width)
    statistics = torch.stack((x.float().mean(1), (x.float().var(1, correction=0) + EPSILON).rsqrt()))

    def gradients(to):
        leaves = [t.to(to).requires_grad_() for t in (x, weight, bias)]
        y = F.layer_norm(leaves[0], (width,), *leaves[1:], EPSILON)
        return torch.autograd.grad(y, leaves, dy.to(to))

    exact, plain = gradients(torch.float64), gradients(dtype)
    for name, t in both_layouts(dy).items():
        dx = torch.full_like(x, float("nan"))
        sums = affine_layer_norm_backward(t, x, statistics, weight, dsum, dx)
        assert_close(f"{name} dx", dx, plain[0] + dsum, exact[0] + dsum.double())
        assert error(sums[0], exact[1]) < 1e-4 and error(sums[1], exact[2]) < 1e-5
        alone = affine_layer_norm_backward(t, x, statistics, weight, None, None)
        assert torch.equal(alone, sums)


def test_rows_behind_the_last_are_zeros():
    w = torch.randn(45, 64).to(BF16)
    forward, _ = weight_forward(w, None, None, None)
    assert forward.columns == 64 and torch.equal(forward.data, pack(w).data)
    backward = weight_backward(w, None, None)
    assert backward.depth == blocked.blocks(45) * 32 and torch.equal(backward.data, pack(w.t()).data)
