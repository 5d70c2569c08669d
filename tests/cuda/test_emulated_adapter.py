"""The CUDA adapter kernels, emulated: values and gradients against float64, and every access to memory checked."""

from __future__ import annotations

import pytest
import torch

from fastpeft.ops.activation import FUNCTIONS
from fastpeft.ops.cuda_adapter import CODES
from tests.kernels.close import assert_close
from tests.kernels.test_adapter import plain

TYPES = (torch.bfloat16, torch.float16)
KINDS = ("none", "skip", "other")


def draw(rows, width, hidden, dtype, bias=True):
    """x and the factors, the contribution as large as x."""
    x = torch.randn(rows, width).to(dtype)
    down, up = torch.randn(hidden, width) / width**0.5, torch.randn(width, hidden) / hidden**0.5
    biases = (0.5 * torch.randn(hidden), 0.5 * torch.randn(width)) if bias else (None, None)
    return x, [None if t is None else t.to(dtype) for t in (down, biases[0], up, biases[1])]


def check(emulator, x, factors, activation="gelu", scale=1.0, kind="none", needs=(True, True), seed=0):
    """The output, and from dx, dz and h all gradients."""
    down, down_bias, up, up_bias = factors
    other, dy = (torch.randn(x.shape).to(x.dtype) for _ in range(2))
    exact_y, _, exact = plain(x, factors, activation, scale, kind, other, dy, torch.float64)
    plain_y, _, baseline = plain(x, factors, activation, scale, kind, other, dy, x.dtype)
    residual = {"none": None, "skip": x, "other": other}[kind]
    code = CODES[activation]
    y = emulator.adapter_forward(x, down, down_bias, up, up_bias, residual, code, scale, seed=seed)
    assert_close("y", y, plain_y, exact_y)
    add = dy if kind == "skip" else None
    dx, dz, h = emulator.adapter_backward(dy, x, down, down_bias, up, add, code, scale, needs=needs, seed=seed)
    assert [dx is not None, dz is not None, h is not None] == [needs[0], needs[1], needs[1]]
    if needs[0]:
        assert_close("dx", dx, baseline[0], exact[0])
    if needs[1]:
        found = [dz.t() @ x, dz.sum(0), scale * dy.t() @ h]
        for name, value, at in (("d down", found[0], 1), ("d down_bias", found[1], 2), ("d up", found[2], 3)):
            if exact[at] is not None:
                assert_close(name, value, baseline[at], exact[at])
    return y, dx, dz, h


SHAPES = [
    (rows, width, hidden) for rows in (1, 17, 65, 130) for width in (8, 64, 136) for hidden in (8, 24, 64, 96, 128)
]


@pytest.mark.parametrize("number", range(len(SHAPES)), ids=["-".join(map(str, shape)) for shape in SHAPES])
def test_shapes(emulator, number):
    activation, kind, scale = list(CODES)[number % 6], KINDS[number // 2 % 3], (1.0, 0.5, 4.0)[number // 3 % 3]
    x, factors = draw(*SHAPES[number], TYPES[number % 5 % 2], bias=number % 7 > 0)
    check(emulator, x, factors, activation, scale, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("hidden", [8, 16, 32, 48, 64, 96, 128])
@pytest.mark.parametrize("rows, width", [(1, 768), (197, 768), (130, 192), (64, 1280)])
def test_larger(emulator, rows, width, hidden, dtype, kind):
    x, factors = draw(rows, width, hidden, dtype)
    check(emulator, x, factors, kind=kind, scale=0.5)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", CODES)
def test_activations(emulator, activation, dtype):
    x, factors = draw(33, 64, 32, dtype)
    check(emulator, 3 * x, factors, activation, kind="skip")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("activation", CODES)
def test_activations_far_out(emulator, activation, dtype):
    x = torch.tensor([0.0, -0.0, 1e-4, -1e-4, 12.0, -12.0, 200.0, -200.0, 2e4, -2e4]).repeat_interleave(8).view(10, 8)
    x, eye = x.to(dtype), torch.eye(8).to(dtype)
    y = emulator.adapter_forward(x, eye, None, eye, None, None, CODES[activation], 1.0)
    _, dz, h = emulator.adapter_backward(x.new_ones(x.shape), x, eye, None, eye, None, CODES[activation], 1.0)
    leaf = x.double().requires_grad_()
    exact = FUNCTIONS[activation](leaf)
    (slope,) = torch.autograd.grad(exact.sum(), leaf)
    one = torch.finfo(dtype).eps
    for value, want in ((y, exact.detach()), (h, exact.detach()), (dz, slope)):
        torch.testing.assert_close(value.double(), want, rtol=one, atol=2e-6)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_gradients_that_are_asked_for(emulator, needs):
    x, factors = draw(33, 72, 24, torch.bfloat16)
    check(emulator, x, factors, needs=needs, kind="skip")


def test_rows_apart(emulator):
    x, factors = draw(40, 144, 16, torch.float16)
    check(emulator, x[::2, 8:80], [factors[0][:, :72].contiguous(), factors[1], factors[2][:72], factors[3][:72]])


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_order_of_threads_changes_nothing(emulator, seed):
    x, factors = draw(70, 136, 40, torch.bfloat16)
    torch.manual_seed(1)
    first = check(emulator, x, factors, kind="other")
    torch.manual_seed(1)
    again = check(emulator, x, factors, kind="other", seed=seed)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
