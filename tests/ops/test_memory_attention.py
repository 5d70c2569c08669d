"""Attention to a memory on the queries' side against keys and values; lengths against masks."""

from __future__ import annotations

import pytest
import torch

from fastpeft.ops.lora_linear import LowRankTerm
from fastpeft.ops.memory_attention import memory_attention, pays, reference
from fastpeft.ops.prompt_attention import prompt_attention
from tests.kernels.close import assert_close
from tests.native.amx import needs_amx

B, H, D = 3, 4, 16
WIDTH = H * D


def draw(count: int, rows: int, terms: int, dtype: torch.dtype):
    def random(*shape, scale=1.0):
        return (torch.randn(*shape) * scale).to(dtype)

    q, memory = random(B, count, H, D).transpose(1, 2), random(B, rows, WIDTH)
    weights = [random(WIDTH, WIDTH, scale=WIDTH**-0.5) for _ in range(2)]
    factors = [random(*s, scale=0.3) for _ in range(2 * terms) for s in ((5, WIDTH), (WIDTH, 5))]
    return q, memory, *weights, random(WIDTH), factors


def terms_of(factors, terms: int):
    made = [LowRankTerm(a, b, 0.7, 0, WIDTH) for a, b in zip(factors[::2], factors[1::2], strict=True)]
    return made[:terms], made[terms:]


def run(function, tensors, factors, terms, **options):
    inputs = [t.detach().requires_grad_() for t in (*tensors[:2], *factors)]
    q, memory, *rest = inputs
    y = function(q, memory, *tensors[2:], *terms_of(rest, terms), 0.2, **options)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, inputs, weight)]


@pytest.mark.parametrize("lengths", [None, (7, 1, 33)])
@pytest.mark.parametrize("terms", [0, 1, 2])
@pytest.mark.parametrize("count, rows", [(1, 33), (5, 33), (40, 64)])
def test_in_float64(count, rows, terms, lengths):
    *tensors, factors = draw(count, rows, terms, torch.float64)
    options = {"lengths": None if lengths is None else torch.tensor(lengths, dtype=torch.int32)}
    found = run(memory_attention, tensors, factors, terms, **options)
    for value, exact in zip(found, run(reference, tensors, factors, terms, **options), strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-10, atol=1e-11)


def test_a_mask_is_as_good_as_lengths():
    *tensors, factors = draw(5, 33, 1, torch.float64)
    lengths = torch.tensor([7, 1, 33], dtype=torch.int32)
    mask = torch.arange(33) < lengths[:, None, None, None]
    masked = run(memory_attention, tensors, factors, 1, attn_mask=mask)
    for a, b in zip(masked, run(memory_attention, tensors, factors, 1, lengths=lengths), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("terms", [0, 1])
def test_weights_in_fp32_of_states_in_bf16(terms):
    """As autocast leaves them, to which no product here is told to cast."""
    q, memory, weight_k, weight_v, bias, factors = draw(5, 33, terms, torch.bfloat16)
    expected = run(memory_attention, (q, memory, weight_k, weight_v, bias), factors, terms)
    wide = (q, memory, weight_k.float(), weight_v.float(), bias.float())
    for value, wanted in zip(run(memory_attention, wide, factors, terms), expected, strict=True):
        assert value.dtype == torch.bfloat16 and torch.equal(value, wanted)


@needs_amx
@pytest.mark.parametrize("lengths", [None, (7, 1, 33)])
def test_in_bf16_it_is_as_exact_as_keys_and_values(lengths):
    *tensors, factors = draw(5, 33, 1, torch.bfloat16)
    options = {"lengths": None if lengths is None else torch.tensor(lengths, dtype=torch.int32)}
    wide = [[t.double() for t in each] for each in (tensors, factors)]
    exact = run(reference, *wide, 1, **options)
    plain = run(reference, tensors, factors, 1, **options)
    found = run(memory_attention, tensors, factors, 1, **options)
    for index, values in enumerate(zip(found, plain, exact, strict=True)):
        assert_close(f"result {index}", *values)


@needs_amx
@pytest.mark.parametrize("lengths", [None, (7, 1, 33)])
def test_the_memory_has_one_gradient(lengths, monkeypatch):
    from fastpeft.native.vector import prompt_attention as module

    asked = []
    backward = module.backward

    def watched(*args, **options):
        asked.append(options.get("one_memory", False))
        return backward(*args, **options)

    monkeypatch.setattr(module, "backward", watched)
    *tensors, factors = draw(3, 33, 1, torch.bfloat16)
    lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    run(memory_attention, tensors, factors, 1, lengths=lengths, backend="cpu")
    assert asked == [True]


def test_it_pays_for_few_queries():
    # ViT-B and BERT-base: heads of 64.
    assert pays(15, 12, 768, True, True) and not pays(37, 12, 768, True, True)
    assert pays(25, 12, 768, False, True) and not pays(26, 12, 768, False, True)
    assert pays(63, 12, 768, False, False) and not pays(64, 12, 768, False, False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("prompts", [0, 3])
@pytest.mark.parametrize("rows", [31, 33, 70])
def test_lengths_are_a_mask(rows, prompts, dtype):
    q, k, v = (torch.randn(3, 2, n, 32).to(dtype).requires_grad_() for n in (9, rows, rows))
    extra = [torch.randn(2, prompts, 32).to(dtype).requires_grad_() for _ in range(2)] if prompts else [None, None]
    lengths = torch.tensor([1, rows, rows - 2], dtype=torch.int32)
    mask = torch.arange(rows) < lengths[:, None, None, None]
    inputs = [t for t in (q, k, v, *extra) if t is not None]
    weight = torch.randn(3, 2, 9, 32).to(dtype)

    def both(*given, **options):
        y = prompt_attention(*given, **options)
        leaves = [t for t in given if t is not None]
        return [y.detach(), *torch.autograd.grad(y, leaves, weight.to(y.dtype))]

    found = both(q, k, v, *extra, lengths=lengths)
    wide = [None if t is None else t.detach().double().requires_grad_() for t in (q, k, v, *extra)]
    exact = both(*wide, attn_mask=mask, backend="reference")
    plain = both(q, k, v, *extra, attn_mask=mask, backend="reference")
    for index, values in enumerate(zip(found, plain, exact, strict=True)):
        assert_close(f"result {index}", *values)
    # Keys that nobody sees have no gradient at all.
    assert not found[2][0, :, 1:].any() and not found[3][2, :, rows - 2 :].any()
    assert len(found) == 1 + len(inputs)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_lengths_of_64_bits_and_with_gaps(backend):
    q, k = torch.randn(3, 1, 4, 32).bfloat16(), torch.randn(3, 1, 9, 32).bfloat16()
    lengths = torch.tensor([1, 9, 4], dtype=torch.int32)
    expected = prompt_attention(q, k, k, lengths=lengths, backend=backend)
    for other in (lengths.long(), torch.stack((lengths, lengths + 1), 1)[:, 0]):
        assert torch.equal(prompt_attention(q, k, k, lengths=other, backend=backend), expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    "lengths, words",
    [
        (torch.tensor([1, 10, 4]), "1 to 9, the number of tokens, got 1 to 10"),
        (torch.tensor([1, 0, 4]), "got 0 to 4"),
        (torch.tensor([-(1 << 40), 2, 4]), "1 to 9"),
        (torch.tensor([1, 2]), r"of shape \(3,\), got torch.int64 of shape \(2,\)"),
        (torch.tensor([[1, 2, 3]]), "shape"),
        (torch.tensor([1.0, 2.0, 3.0]), "int32 or int64"),
    ],
)
def test_lengths_that_are_none(lengths, words, backend):
    q, k = torch.randn(3, 1, 4, 32).bfloat16(), torch.randn(3, 1, 9, 32).bfloat16()
    with pytest.raises(ValueError, match=words):
        prompt_attention(q, k, k, lengths=lengths, backend=backend)


def test_lengths_exclude_masks():
    q = torch.randn(1, 1, 2, 8)
    with pytest.raises(ValueError, match="not two of them"):
        prompt_attention(q, q, q, lengths=torch.tensor([1]), causal=True)
