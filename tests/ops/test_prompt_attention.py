"""Attention over tokens and prompts, against a softmax that is written out."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastpeft.ops.prompt_attention import prompt_attention
from fastpeft.trainer.saved import SavedBytes

TOKENS, PROMPTS, HEAD_DIMS = (1, 197, 257), (0, 1, 200), (32, 64, 80, 128)


def written_out(q, k, v, prompt_k=None, prompt_v=None, attn_mask=None, causal=False, scale=None):
    """softmax(scale q [k; k_p]^T + mask) [v; v_p], one sample and one head at a time."""
    tokens, queries = k.shape[-2], q.shape[-2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bias = torch.zeros(q.shape[0], q.shape[1], queries, tokens, dtype=q.dtype)
    if attn_mask is not None:
        bias = bias + (torch.where(attn_mask, 0.0, -torch.inf) if attn_mask.dtype == torch.bool else attn_mask)
    if causal:
        later = torch.arange(tokens)[None, :] > torch.arange(queries)[:, None]
        bias = bias.masked_fill(later, -torch.inf)
    out = []
    for sample, head in itertools.product(range(q.shape[0]), range(q.shape[1])):
        keys, values, logits_bias = k[sample, head], v[sample, head], bias[sample, head]
        if prompt_k is not None:
            place = (head,) if prompt_k.dim() == 3 else (sample, head)
            keys, values = torch.cat((keys, prompt_k[place])), torch.cat((values, prompt_v[place]))
            logits_bias = torch.nn.functional.pad(logits_bias, (0, prompt_k.shape[-2]))
        weights = (scale * (q[sample, head] @ keys.T) + logits_bias).exp()
        out.append(weights / weights.sum(-1, keepdim=True) @ values)
    return torch.stack(out).view(*q.shape)


def inputs(tokens, length, head_dim, *, queries=None, batch=2, heads=3, shared=True, dtype=torch.float64):
    shape = (heads, length, head_dim) if shared else (batch, heads, length, head_dim)
    made = [torch.randn(batch, heads, queries or tokens, head_dim, dtype=dtype)]
    made += [torch.randn(batch, heads, tokens, head_dim, dtype=dtype) for _ in range(2)]
    made += [torch.randn(shape, dtype=dtype) for _ in range(2)]
    return [t.requires_grad_() for t in made]


def same_with_gradients(arguments, **options):
    weight = torch.randn_like(arguments[0])
    results = []
    for function in (prompt_attention, written_out):
        out = function(*arguments, **options)
        wanted = [t for t in arguments if t is not None and t.requires_grad]
        gradients = torch.autograd.grad(out, wanted, weight, allow_unused=True)
        results.append(
            [out, *(torch.zeros_like(t) if g is None else g for t, g in zip(wanted, gradients, strict=True))]
        )
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-sample"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("length", PROMPTS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_against_a_written_out_softmax(tokens, length, head_dim, shared):
    same_with_gradients(inputs(tokens, length, head_dim, batch=2, heads=1 if tokens > 1 else 3, shared=shared))


def masks(tokens, queries, batch, heads):
    diagonal = torch.eye(queries, tokens, dtype=torch.bool)  # nobody is without anything to see
    return {
        "boolean": (torch.rand(queries, tokens) > 0.4) | diagonal,
        "boolean per sample": (torch.rand(batch, 1, queries, tokens) > 0.4) | diagonal,
        "additive": torch.randn(queries, tokens, dtype=torch.float64),
        "additive per head": torch.randn(1, heads, queries, tokens, dtype=torch.float64),
        "additive with -inf": torch.where(diagonal, 0.0, -torch.inf).double(),
    }


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-sample"])
@pytest.mark.parametrize("length", [0, 1, 5])
@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("kind", masks(1, 1, 1, 1))
def test_masks_cover_the_tokens_and_everybody_sees_the_prompts(kind, queries, length, shared):
    arguments = inputs(9, length, 8, queries=queries, shared=shared)
    same_with_gradients(arguments, attn_mask=masks(9, queries, 2, 3)[kind])


@pytest.mark.parametrize("length", [0, 1, 5])
@pytest.mark.parametrize("queries", [1, 4, 9])
def test_causal(queries, length):
    same_with_gradients(inputs(9, length, 8, queries=queries), causal=True)


def test_no_prompts_given():
    q, k, v, _, _ = inputs(9, 0, 8)
    same_with_gradients([q, k, v, None, None])
    same_with_gradients([q, k, v, None, None], causal=True)


@pytest.mark.parametrize("scale", [None, 1.0, 0.07])
def test_scale(scale):
    same_with_gradients(inputs(9, 3, 8), scale=scale)


@pytest.mark.parametrize("wanted", [w for w in itertools.product([True, False], repeat=5) if any(w)], ids=str)
def test_every_choice_of_inputs_that_need_gradients(wanted):
    arguments = [t.detach().requires_grad_(w) for t, w in zip(inputs(5, 3, 8), wanted, strict=True)]
    same_with_gradients(arguments)


def test_views_of_a_fused_projection():
    fused = torch.randn(2, 9, 3, 2, 8, dtype=torch.float64)
    q, k, v = (t.transpose(1, 2).requires_grad_() for t in fused.detach().unbind(2))
    assert not q.is_contiguous()
    prompts = torch.randn(3, 2, 8, 2, dtype=torch.float64).permute(3, 1, 0, 2).detach()
    same_with_gradients([q[:, :, :4], k, v, prompts[0].requires_grad_(), prompts[1].requires_grad_()])


def test_queries_beside_prompts_do_not_keep_the_projection_they_are_a_part_of():
    projected = torch.randn(2, 17, 3, 4, 16, requires_grad=True) * 1
    q, k, v = projected.permute(2, 0, 3, 1, 4)
    prompts = [torch.randn(2, 4, 5, 16) for _ in range(2)]
    with SavedBytes([]) as saved:
        kept = prompt_attention(q, k, v, *prompts, backend="reference")
    of_a_row = q.nbytes // 17
    # Queries, what comes out, keys and values of 5 prompts more, and of each query the logarithm of its sum.
    assert saved.total == of_a_row * (17 + 17 + 2 * (17 + 5)) + kept.nbytes // 16


def test_no_copy_of_queries_where_nothing_is_kept(monkeypatch):
    monkeypatch.setattr("fastpeft.ops.prompt_attention._alone", None)
    q, k, v = torch.randn(2, 17, 3, 4, 16).permute(2, 0, 3, 1, 4)
    prompt_attention(q, k, v, k[:, :, :5], v[:, :, :5], backend="reference")


def test_gradcheck():
    torch.autograd.gradcheck(prompt_attention, tuple(inputs(3, 2, 4, batch=1, heads=2)))


def test_dropout_acts_on_the_weights():
    arguments = inputs(9, 3, 8)
    torch.manual_seed(0)
    first = prompt_attention(*arguments, dropout=0.5)
    assert not torch.allclose(first, prompt_attention(*arguments))
    torch.manual_seed(0)
    assert torch.equal(first, prompt_attention(*arguments, dropout=0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens, length", [(1, 1), (197, 0), (197, 50), (257, 200)])
def test_lower_precision_against_the_unfused_path(tokens, length, dtype):
    arguments = [t.detach() for t in inputs(tokens, length, 64, batch=1, heads=2, dtype=dtype)]
    exact = written_out(*(t.double() for t in arguments))

    def error(out):
        return float((out.double() - exact).norm() / exact.norm())

    unfused = error(written_out(*arguments))
    assert error(prompt_attention(*arguments)) <= min(2 * unfused + torch.finfo(dtype).eps / 2, 0.02)


@pytest.fixture
def matrix_units(monkeypatch):
    """A CPU that multiplies bf16 natively, whatever this one does."""
    monkeypatch.setattr("fastpeft.ops.recomputed_attention.cpu_features", lambda: frozenset({"amx_bf16"}))


def explicit(q, k, v, prompt_k, prompt_v):
    """Plain PyTorch in the inputs' own type, product by product."""
    k, v = (torch.cat((t, p.expand(len(t), -1, -1, -1)), dim=2) for t, p in ((k, prompt_k), (v, prompt_v)))
    return torch.softmax(q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2), dim=-1) @ v


@pytest.mark.usefixtures("poisoned_memory", "matrix_units")
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(
    ("queries", "tokens", "length"), [(1, 1, 0), (1, 197, 10), (17, 17, 0), (65, 65, 10), (257, 257, 200)]
)
def test_bf16_gradients_are_no_worse_than_explicit_products(queries, tokens, length, head_dim):
    """The backward pass that computes the probabilities again: all five gradients against float64."""
    exact = inputs(tokens, length, head_dim, queries=queries, batch=3)
    low = [t.detach().bfloat16().requires_grad_() for t in exact]
    exact = [t.detach().double().requires_grad_() for t in low]
    weight = torch.randn_like(low[0])
    count = 5 if length else 3
    expected = torch.autograd.grad(prompt_attention(*exact), exact[:count], weight.double())
    ours = torch.autograd.grad(out := prompt_attention(*low, backend="reference"), low[:count], weight)
    assert "Recomputed" in type(out.grad_fn).__name__
    baseline = torch.autograd.grad(explicit(*low), low[:count], weight)
    for own, plain, true in zip(ours, baseline, expected, strict=True):
        size = true.norm()
        if size > 1e-3:
            error, allowed = ((t.double() - true).norm() / size for t in (own, plain))
            assert error <= 1.25 * allowed + 2**-9


@pytest.mark.usefixtures("matrix_units")
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2), (3, 4)])
def test_bf16_gradients_one_by_one_and_twice(wanted):
    """Only what is asked for is computed, and a kept graph gives the same again."""
    tensors = [t.detach().bfloat16() for t in inputs(17, 4, 32)]
    every = [t.clone().requires_grad_() for t in tensors]
    weight = torch.randn_like(tensors[0])
    expected = torch.autograd.grad(prompt_attention(*every), every, weight)
    some = [t.clone().requires_grad_(index in wanted) for index, t in enumerate(tensors)]
    out = prompt_attention(*some)
    for _ in range(2):
        found = torch.autograd.grad(out, [some[i] for i in wanted], weight, retain_graph=True)
        assert all(torch.equal(gradient, expected[i]) for gradient, i in zip(found, wanted, strict=True))


@pytest.mark.usefixtures("matrix_units")
def test_a_backward_pass_inside_autocast():
    q, k, v, *_ = (t.detach().bfloat16().requires_grad_() for t in inputs(17, 0, 32))
    expected = torch.autograd.grad(prompt_attention(q, k, v).sum(), (q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(prompt_attention(q, k, v).sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.usefixtures("matrix_units")
def test_function_transforms():
    q, k, v, *_ = (t.detach().bfloat16() for t in inputs(17, 0, 32))
    found = torch.func.grad(lambda q: prompt_attention(q, k, v).sum())(q)
    expected = torch.autograd.grad(prompt_attention(q.requires_grad_(), k, v).sum(), q)[0]
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


def test_a_cpu_without_bf16_products_runs_torchs_own(monkeypatch):
    monkeypatch.setattr("fastpeft.ops.recomputed_attention.cpu_features", lambda: frozenset({"avx512f"}))
    q = torch.randn(1, 1, 4, 32, dtype=torch.bfloat16, requires_grad=True)
    assert "Recomputed" not in type(prompt_attention(q, q, q).grad_fn).__name__


@pytest.mark.usefixtures("matrix_units")
def test_long_and_masked_attention_is_torchs_own():
    q = torch.randn(1, 1, 4, 32, dtype=torch.bfloat16, requires_grad=True)
    k = torch.randn(1, 1, 641, 32, dtype=torch.bfloat16)
    assert "Recomputed" not in type(prompt_attention(q, k, k).grad_fn).__name__
    assert "Recomputed" not in type(prompt_attention(q, q, q, causal=True).grad_fn).__name__
