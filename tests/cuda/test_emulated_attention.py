"""The CUDA attention kernels, emulated: values and gradients against float64, and every access to memory checked."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.kernels.close import assert_close, error

TYPES = (torch.bfloat16, torch.float16)
DIMS = (32, 64, 80, 96, 128)
NAMES = ("dq", "dk", "dv", "dprompt_k", "dprompt_v")


def draw(dim, queries, tokens, prompts, dtype, *, batch=2, heads=2, shared=True):
    """q, k, v and the prompts, at logits of a few units."""
    shapes = [(batch, heads, rows, dim) for rows in (queries, tokens, tokens)]
    shapes += [((heads, prompts, dim) if shared else (batch, heads, prompts, dim))] * 2
    return [torch.randn(shape).to(dtype) for shape in shapes]


def softmax(q, k, v, prompt_k, prompt_v, scale, causal):
    """The equation, and the log-sum-exp."""
    keys, values = (torch.cat((t, p.expand(len(t), -1, -1, -1)), dim=2) for t, p in ((k, prompt_k), (v, prompt_v)))
    scores = scale * (q @ keys.transpose(-1, -2))
    if causal:
        later = torch.arange(k.shape[2])[None, :] > torch.arange(q.shape[2])[:, None]
        scores[..., : k.shape[2]].masked_fill_(later, -torch.inf)
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


def by_torch(inputs, dout, scale, causal, dtype):
    """(out, lse), gradients"""
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
    out, lse = softmax(*leaves, scale, causal)
    gradients = torch.autograd.grad(out, leaves, dout.to(dtype), allow_unused=True)
    return (out.detach(), lse.detach()), gradients


def check(emulator, inputs, *, causal=False, scale=None, needs=(True,) * 5, processors=4, seed=0):
    """Forward and the gradients that are needed."""
    dtype = inputs[0].dtype
    scale = inputs[0].shape[-1] ** -0.5 if scale is None else scale
    dout = torch.randn(inputs[0].shape).to(dtype)
    (exact_out, exact_lse), exact = by_torch(inputs, dout, scale, causal, torch.float64)
    (plain_out, _), plain = by_torch(inputs, dout, scale, causal, dtype)
    out, lse = emulator.attention_forward(*inputs, scale, causal, seed=seed)
    assert_close("out", out, plain_out, exact_out)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)
    found = emulator.attention_backward(
        dout, *inputs, out, lse, scale, causal, needs=needs, processors=processors, seed=seed
    )
    for name, value, need, ours, want in zip(NAMES, found, needs, plain, exact, strict=True):
        assert (value is not None) == need, name
        if need and want.count_nonzero():
            assert_close(name, value, ours, want)
        elif need:
            # With a single key nothing changes the weights: what comes out is the rounding of fp32.
            assert value.shape == want.shape and bool((value.abs() < 1e-5).all()), name
    return out, found


ROWS = (1, 3, 17, 33, 50, 65)
SMALL = [
    (dim, ROWS[n % 6], (0, 1, 5)[(n + n // 3) % 3], shared)
    for n, (dim, _, shared) in enumerate(itertools.product(DIMS, range(6), (True, False)))
]


@pytest.mark.parametrize("number", range(len(SMALL)), ids=["-".join(map(str, case)) for case in SMALL])
def test_small(emulator, number):
    dim, rows, prompts, shared = SMALL[number]
    check(emulator, draw(dim, rows, rows, prompts, TYPES[number // 2 % 2], shared=shared), causal=number % 5 == 0)


COMBINATIONS = list(itertools.product(DIMS, (1, 17, 65, 197), (0, 1, 5, 200), (True, False), (True, False)))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(COMBINATIONS)), ids=["-".join(map(str, case)) for case in COMBINATIONS])
def test_every_combination(emulator, number):
    dim, rows, prompts, shared, causal = COMBINATIONS[number]
    # Neighbours in every direction have the other type.
    dtype = TYPES[(DIMS.index(dim) + number // 16 % 4 + number // 4 % 4 + number // 2 + number) % 2]
    check(emulator, draw(dim, rows, rows, prompts, dtype, shared=shared), causal=causal)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows, prompts", [(257, 10), (577, 0), (577, 200)])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_larger(emulator, dim, rows, prompts, dtype):
    check(emulator, draw(dim, rows, rows, prompts, dtype, batch=1))


@pytest.mark.parametrize("tokens, prompts", [(1, 0), (0, 1), (0, 33), (64, 0), (64, 64), (63, 2), (130, 70)])
@pytest.mark.parametrize("causal", [False, True])
def test_tokens_and_prompts_that_meet_within_tiles_and_between_them(emulator, tokens, prompts, causal):
    check(emulator, draw(64, 70, tokens, prompts, torch.bfloat16), causal=causal)


@pytest.mark.parametrize("queries, tokens", [(1, 65), (65, 1), (4, 130), (130, 4), (129, 128), (128, 129)])
@pytest.mark.parametrize("causal", [False, True])
def test_more_queries_than_keys_and_fewer(emulator, queries, tokens, causal):
    check(emulator, draw(64, queries, tokens, 3, torch.float16, shared=False), causal=causal)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "needs", list(itertools.product([True, False], repeat=5)), ids=lambda n: "".join("01"[x] for x in n)
)
def test_gradients_that_are_asked_for(emulator, needs, shared):
    check(emulator, draw(32, 19, 19, 3, torch.float16, shared=shared), needs=needs)


@pytest.mark.parametrize("batch, processors", [(1, 1), (5, 1), (5, 7), (7, 100)])
def test_gradients_of_shared_prompts_in_groups_of_samples(emulator, batch, processors):
    check(emulator, draw(64, 20, 20, 40, torch.bfloat16, batch=batch), processors=processors)


@pytest.mark.parametrize("dim", [64, 80])
def test_slices_of_one_projection(emulator, dim):
    whole = torch.randn(2, 35, 3, 2, dim).to(torch.float16)
    q, k, v = (whole[:, :, part].transpose(1, 2) for part in range(3))
    prompts = torch.randn(2, 9, 2, dim).to(torch.float16).transpose(1, 2)[:, :, 2:7]
    assert not any(t.is_contiguous() for t in (q, k, v, prompts))
    check(emulator, [q, k, v, prompts[0], prompts[1]])
    check(emulator, [q, k, v, prompts, prompts.flip(0)])


def test_keys_that_the_batch_shares_by_a_stride_of_zero(emulator):
    q, k, v, prompt_k, prompt_v = draw(64, 20, 20, 4, torch.bfloat16)
    check(emulator, [q, k[:1].expand_as(k), v[:1].expand_as(v), prompt_k, prompt_v])


@pytest.mark.parametrize("scale", [1e-3, 0.5])
def test_scale(emulator, scale):
    check(emulator, draw(64, 33, 33, 5, torch.bfloat16), scale=scale)


def test_scores_as_large_as_the_format_allows(emulator):
    q, k, v, prompt_k, prompt_v = draw(64, 33, 33, 5, torch.bfloat16)
    out, lse = emulator.attention_forward(300 * q, 300 * k, v, 300 * prompt_k, prompt_v, 0.125, False)
    exact, _ = softmax(*(t.double() for t in (300 * q, 300 * k, v, 300 * prompt_k, prompt_v)), 0.125, False)
    assert lse.isfinite().all()
    assert error(out, exact) < 1e-2


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_order_of_threads_changes_nothing(emulator, seed):
    inputs = draw(64, 70, 70, 9, torch.bfloat16)
    torch.manual_seed(1)
    out, gradients = check(emulator, inputs, causal=True)
    torch.manual_seed(1)
    again, others = check(emulator, inputs, causal=True, seed=seed)
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))


def test_the_comparison_sees_one_wrong_row(emulator):
    inputs = draw(64, 33, 33, 5, torch.bfloat16)
    exact, plain = (softmax(*(t.to(kind) for t in inputs), 0.125, False)[0] for kind in (torch.float64, torch.bfloat16))
    out, _ = emulator.attention_forward(*inputs, 0.125, False)
    assert_close("out", out, plain, exact)
    out[1, 0, 7] = out[1, 0, 8]
    with pytest.raises(AssertionError, match="out: relative error"):
        assert_close("out", out, plain, exact)
