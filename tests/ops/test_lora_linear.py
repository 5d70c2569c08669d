"""A linear layer with low-rank terms beside it, against W + scale B A formed in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from fastpeft.ops.lora_linear import LowRankTerm, lora_linear

IN, SPLITS = 6, [4, 4, 5]
OUT = sum(SPLITS)
SPANS = {"first": (0, 4), "second": (4, 8), "third": (8, 13), "all": (0, 13)}


def tensor(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def term(span, rank=2, scale=0.7, *, bias=False, dropout=None, inputs=IN, dtype=torch.float64):
    start, stop = SPANS[span] if isinstance(span, str) else span
    extra = tensor(stop - start, dtype=dtype) if bias else None
    return LowRankTerm(
        tensor(rank, inputs, dtype=dtype), tensor(stop - start, rank, dtype=dtype), scale, start, stop, dropout, extra
    )


def formed(x, weight, bias, terms):
    """x (W + sum scale B A)^T + b, without dropout."""
    y = F.linear(x, weight, bias)
    for t in terms:
        delta = t.scale * F.linear(x, t.b @ t.a, t.bias)
        y = y + F.pad(delta, (t.start, weight.shape[0] - t.stop))
    return y


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 1, 3), (0,)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("spans", [s for n in range(5) for s in itertools.combinations(SPANS, n)], ids=str)
def test_against_the_formed_weight(spans, with_bias, shape):
    x, weight, bias = tensor(*shape, IN), tensor(OUT, IN), tensor(OUT) if with_bias else None
    terms = [term(span, rank=1 + i, bias=i % 2 == 1) for i, span in enumerate(spans)]
    parts = lora_linear(x, weight, bias, terms, SPLITS)
    assert [p.shape for p in parts] == [(*shape, width) for width in SPLITS]
    expected = formed(x, weight, bias, terms)
    torch.testing.assert_close(torch.cat(parts, -1), expected)
    wanted = [t for t in (x, weight, bias, *(f for t in terms for f in (t.a, t.b, t.bias))) if t is not None]
    seed = torch.randn_like(expected)
    pairs = zip(
        torch.autograd.grad(torch.cat(parts, -1), wanted, seed),
        torch.autograd.grad(expected, wanted, seed),
        strict=True,
    )
    for actual, exact in pairs:
        torch.testing.assert_close(actual, exact)


@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=5)), ids=str)
def test_every_choice_of_inputs_that_need_gradients(wanted):
    tensors = [tensor(3, IN), tensor(OUT, IN), tensor(OUT), tensor(2, IN), tensor(5, 2)]
    for t, want in zip(tensors, wanted, strict=True):
        t.requires_grad_(want)

    def run(x, weight, bias, a, b):
        return torch.cat(lora_linear(x, weight, bias, [LowRankTerm(a, b, 0.5, 8, 13)], SPLITS), -1)

    assert run(*tensors).requires_grad == any(wanted)
    if any(wanted):
        torch.autograd.gradcheck(run, tuple(tensors))


def test_gradcheck_of_two_terms_that_share_a_product():
    def run(x, a1, b1, a2, b2):
        terms = [LowRankTerm(a1, b1, 0.5, 0, 4), LowRankTerm(a2, b2, 2.0, 8, 13)]
        return tuple(lora_linear(x, torch.ones(OUT, IN, dtype=x.dtype), None, terms, SPLITS))

    torch.autograd.gradcheck(run, (tensor(3, IN), tensor(2, IN), tensor(4, 2), tensor(1, IN), tensor(5, 1)))


def test_dropout_acts_on_the_terms_input_only():
    x, weight = tensor(3, IN), tensor(OUT, IN)
    masks = [torch.rand(3, IN, dtype=torch.float64) for _ in range(2)]
    terms = [term(s, dropout=lambda h, m=m: h * m) for s, m in zip(("first", "third"), masks, strict=True)]
    actual = torch.cat(lora_linear(x, weight, None, terms, SPLITS), -1)
    expected = F.linear(x, weight)
    for t, m in zip(terms, masks, strict=True):
        expected = expected + F.pad(t.scale * (x * m) @ t.a.T @ t.b.T, (t.start, OUT - t.stop))
    torch.testing.assert_close(actual, expected)


def test_inputs_are_not_written_to():
    x, weight, bias, terms = tensor(3, IN), tensor(OUT, IN), tensor(OUT), [term("first"), term("all")]
    before = [t.detach().clone() for t in (x, weight, bias, terms[0].a, terms[0].b, terms[1].a, terms[1].b)]
    out = torch.cat(lora_linear(x, weight, bias, terms, SPLITS), -1).sum()
    out.backward(retain_graph=True)
    first = x.grad.clone()
    out.backward()
    torch.testing.assert_close(x.grad, 2 * first)
    after = (x, weight, bias, terms[0].a, terms[0].b, terms[1].a, terms[1].b)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
def test_the_contribution_in_bfloat16(size):
    """What the term adds, not the total, which hides a term that came out wrong."""
    fused, unfused = [], []
    for seed in range(8):
        torch.manual_seed(seed)
        x, weight = torch.randn(64, 128).bfloat16(), 0.03 * torch.randn(96, 128).bfloat16()
        a, b = torch.randn(4, 128), size * torch.randn(96, 4) / 2
        base = F.linear(x, weight)
        exact = x.double() @ a.bfloat16().double().T @ b.bfloat16().double().T
        one_sum = lora_linear(x, weight, None, [LowRankTerm(a, b, 1.0, 0, 96)], [96])[0]
        two_products = base + x @ a.bfloat16().T @ b.bfloat16().T
        for errors, y in ((fused, one_sum), (unfused, two_products)):
            errors.append(float((y.double() - base.double() - exact).norm() / exact.norm()))
    assert sum(fused) <= 2 * sum(unfused)
