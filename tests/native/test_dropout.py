"""Dropped rows without a mask in memory: the very mask of the reference, and the sum of the gradient."""

from __future__ import annotations

import pytest
import torch

from fastpeft.native.vector import dropout
from fastpeft.ops.dropout_mask import dropout_mask, keep_by_words, mask_words
from fastpeft.ops.dropped_rows import dropped_rows
from tests.kernels.close import error

SEED, STEP = torch.tensor(3), torch.tensor(7)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("samples, shape", [(1, (1, 16)), (3, (5, 17)), (4, (7, 48)), (2, (3, 331))])
def test_the_references_mask_and_gradient(level, samples, shape, dtype):
    x = torch.randn(shape).to(dtype)
    words = mask_words(SEED, STEP, 11, (5, samples), x.numel())
    mask = dropout_mask(SEED, STEP, 11, (5, samples), x.numel(), 0.3, dtype).view(samples, *shape)
    assert torch.equal(keep_by_words(words[0][:, None], words[1], 0.3).view(mask.shape), mask != 0)
    assert torch.equal(dropout.forward(x, *words, 0.3), x * mask)
    dout = torch.randn(samples, *shape).to(dtype)
    exact = (dout.double() * mask.double()).sum(0)
    assert error(dropout.backward(dout.transpose(0, 1).contiguous().transpose(0, 1), *words, 0.3), exact) < 1e-6


def test_as_an_operator():
    x = torch.randn(4, 24, requires_grad=True)
    native = dropped_rows(x, SEED, STEP, 2, (0, 3), 0.5)
    doubled = x.detach().double().requires_grad_()
    plain = dropped_rows(doubled, SEED, STEP, 2, (0, 3), 0.5)
    assert type(native.grad_fn).__name__ == "_DroppedBackward" != type(plain.grad_fn).__name__
    torch.testing.assert_close(native.double(), plain)
    weights = torch.randn(3, 4, 24)
    native.backward(weights), plain.backward(weights.double())
    torch.testing.assert_close(x.grad.double(), doubled.grad)


def test_what_is_left_to_the_reference():
    assert dropout.reasons(torch.randn(4)) == ["4 numbers are fewer than 16"]
    assert "float16" in dropout.reasons(torch.randn(99).half())[0]
    assert not dropout.reasons(torch.randn(16))
