"""Cross-entropy over a vocabulary in place of its logits, against float64."""

from __future__ import annotations

import pytest
import torch

from fastpeft import _native
from fastpeft.native.vector import library
from fastpeft.native.vector.cross_entropy import losses_
from fastpeft.ops.linear_cross_entropy import linear_cross_entropy, reference
from tests.kernels.close import assert_close

HERE = [name for name, needs in _native.LEVELS.items() if needs <= _native.cpu_features()]
pytestmark = pytest.mark.skipif(_native.library() is None, reason="the native library is not built")


@pytest.fixture(params=HERE)
def level(request, monkeypatch):
    """Run the functions of one instruction set after another."""
    monkeypatch.setattr(library, "level", lambda: request.param)
    return request.param


def draw(rows: int, vocabulary: int, dtype: torch.dtype):
    x = torch.randn(rows, 24).to(dtype)
    weight = (torch.randn(vocabulary, 24) * 0.7).to(dtype)
    targets = torch.randint(vocabulary, (rows,))
    targets[0], targets[-1] = vocabulary - 1, 0
    return x, weight, torch.randn(vocabulary).to(dtype), targets


def run(function, x, weight, bias, targets, dtype=None, **options):
    inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, weight, bias)]
    losses = function(*inputs, targets, **options)
    scale = torch.rand(len(targets), generator=torch.Generator().manual_seed(5)).to(losses.dtype)
    return [losses.detach(), *torch.autograd.grad(losses, inputs, scale)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [2, 3, 15, 16, 17, 64, 65, 1003])
@pytest.mark.parametrize("rows", [1, 5])
def test_against_float64(level, rows, vocabulary, dtype):
    given = draw(rows, vocabulary, dtype)
    exact = run(reference, *given, dtype=torch.float64)
    plain = run(reference, *given)
    for index, values in enumerate(zip(run(linear_cross_entropy, *given, backend="cpu"), plain, exact, strict=True)):
        # Losses are fp32 of logits in the inputs' type. The exponential is right to 1e-7, near a loss of zero too.
        found, plain_one, exact_one = values
        assert_close(f"result {index}", found.to(dtype), plain_one.to(dtype), exact_one, roundings=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
def test_logits_far_from_zero(level, offset, dtype):
    logits = (torch.randn(3, 70) * 30 + offset).to(dtype)
    targets = torch.tensor([0, 69, 33])
    exact = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    slopes = logits.double().softmax(-1) - torch.nn.functional.one_hot(targets, 70)
    found = losses_(logits, targets, True)
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=2e-3 if offset else 2e-5)
    torch.testing.assert_close(logits.double(), slopes, rtol=1e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-6)


def test_without_a_gradient_the_logits_stay(level):
    logits = torch.randn(3, 70)
    before = logits.clone()
    losses_(logits, torch.tensor([0, 69, 33]), False)
    assert torch.equal(logits, before)


def test_threads_give_equal_bits(level):
    before, results = torch.get_num_threads(), []
    logits, targets = torch.randn(7, 1000), torch.randint(1000, (7,))
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            own = logits.clone()
            results.append((losses_(own, targets, True), own))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [-100, -1, 70, 1 << 40])
def test_targets_outside_the_vocabulary(wrong, dtype, backend):
    """By the reference and by an implementation, with and without a gradient; -100 is one of them."""
    x, weight, bias, targets = draw(5, 70, dtype)
    targets[3] = wrong
    for needed in (True, False):
        with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
            linear_cross_entropy(x.requires_grad_(needed), weight, bias, targets, backend)


def test_threads_see_targets_outside(level):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for place in range(7):
            targets = torch.zeros(7, dtype=torch.int64)
            targets[place] = 9
            with pytest.raises(IndexError, match="Target 9 is"):
                losses_(torch.randn(7, 9), targets, True)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_targets_of_other_types_and_shapes(backend):
    x, weight, bias, targets = draw(5, 70, torch.float32)
    for wrong in (targets.int(), targets.float(), targets[:4], targets[:, None], targets[0]):
        with pytest.raises(ValueError, match="int64 target for each of 5 rows"):
            linear_cross_entropy(x, weight, bias, wrong, backend)


def test_no_rows():
    x = torch.randn(0, 8, requires_grad=True)
    losses = linear_cross_entropy(x, torch.randn(5, 8), None, torch.zeros(0, dtype=torch.int64))
    assert losses.shape == (0,)
