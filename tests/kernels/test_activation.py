"""Activations and derivatives inside kernels against autograd in float64."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from fastpeft.kernels._activation import CODES, activate, derivative
from fastpeft.ops.activation import FUNCTIONS

EPS = torch.finfo(torch.float32).eps


@triton.jit
def _kernel(z_ptr, value_ptr, slope_ptr, n, CODE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + at, mask=at < n, other=0.0)
    tl.store(value_ptr + at, activate(z, CODE), mask=at < n)
    tl.store(slope_ptr + at, derivative(z, CODE), mask=at < n)


def run(z, name):
    value, slope = torch.full_like(z, float("nan")), torch.full_like(z, float("nan"))
    _kernel[(triton.cdiv(z.numel(), 256),)](z, value, slope, z.numel(), CODES[name], 256)
    return value, slope


def exact(z, name):
    z = z.double().requires_grad_()
    value = FUNCTIONS[name](z)
    (slope,) = torch.autograd.grad(value.sum(), z)
    return value.detach(), slope


def arguments():
    """Dense where the functions bend, then by powers of ten up to what fp32 holds."""
    powers = 10.0 ** torch.arange(-38, 39, dtype=torch.float64)
    largest = torch.tensor([torch.finfo(torch.float32).max])
    near, far = torch.linspace(-12, 12, 4001), torch.cat([powers.float(), largest])
    return torch.cat([near, torch.randn(999) * 5, far, -far, torch.zeros(1)])


def test_names_are_those_of_the_operators():
    assert set(CODES) == set(FUNCTIONS)
    assert len(set(CODES.values())) == len(CODES)


@pytest.mark.parametrize("name", CODES)
def test_values_and_derivatives(name):
    z = arguments()
    # torch's double ReLU has no derivative at 0 to speak of: it takes 0, and so does the kernel.
    for got, want, size in zip(run(z, name), exact(z, name), (z.abs().double(), torch.ones(())), strict=True):
        # exp, erf and the rounding of their arguments: a few units in the last place of the largest term.
        bound = 8 * EPS * torch.maximum(want.abs(), size)
        wrong = ~((got.double() - want).abs() <= bound + 1e-37)
        assert not wrong.any(), [(z[i].item(), got[i].item(), want[i].item()) for i in wrong.nonzero()[:5, 0]]


@pytest.mark.parametrize("name", CODES)
def test_the_derivative_is_that_of_the_value(name):
    z = torch.linspace(-6, 6, 121) + 0.003
    (above, _), (below, _), (_, slope) = run(z + 1e-2, name), run(z - 1e-2, name), run(z, name)
    smooth = ((above - below) / 2e-2 - slope).abs()
    if name == "relu":
        smooth = smooth[z.abs() > 1e-2]
    assert smooth.max() < 1e-3
