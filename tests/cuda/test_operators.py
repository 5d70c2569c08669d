"""fastpeft's operators on the CUDA backend, emulated: checks, layouts, dtypes, autograd, a model."""

from __future__ import annotations

import pytest
import torch

from fastpeft import _cuda
from fastpeft.ops import choose, cuda_adapter, cuda_attention
from fastpeft.ops.adapter import adapter
from fastpeft.ops.choose import BackendError, Chip, emulated
from fastpeft.ops.prompt_attention import prompt_attention
from fastpeft.ops.prompt_attention import reference as attention_reference
from tests.kernels.close import assert_close

TYPES = (torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def chip(operators):
    """A GPU to choose for, whose kernels are the emulated ones."""
    choose.unavailable.cache_clear()
    with emulated(Chip("cuda", 90)):
        yield
    choose.unavailable.cache_clear()


def leaves(*tensors, dtype=None):
    return [
        None if t is None else t.detach().clone().to(dtype or t.dtype).requires_grad_(t.requires_grad or dtype is None)
        for t in tensors
    ]


def draw(rows=19, length=5, dim=64, dtype=torch.bfloat16, prompts=None, batch=2, heads=3, shared=True):
    """A fused projection, and prompts."""
    fused = torch.randn(batch, rows, 3 * heads * dim).to(dtype)
    shape = (heads, length, dim) if shared else (batch, heads, length, dim)
    return [fused, *(torch.randn(shape).to(prompts or dtype) for _ in range(2))]


def parts(fused, dim=64, heads=3):
    return [t.transpose(1, 2) for t in fused.unflatten(-1, (3, heads, dim)).unbind(2)]


def attend(inputs, dout, dtype, backend, **options):
    """(out, gradients) of attention on a fused projection."""
    fused, prompt_k, prompt_v = (t.detach().to(dtype if dtype == torch.float64 else t.dtype) for t in inputs)
    wanted = [t.requires_grad_() for t in (fused, prompt_k, prompt_v)]
    q, k, v = parts(fused)
    if backend == "cuda":
        out = prompt_attention(q, k, v, prompt_k, prompt_v, backend="cuda", **options)
    else:
        masters = (prompt_k.to(fused.dtype), prompt_v.to(fused.dtype))
        out = attention_reference(q, k, v, *masters, None, options.get("causal", False), 0.125, 0.0, None, None)
    return out, torch.autograd.grad(out, wanted, dout.to(out.dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_attention(chip, causal, shared, masters, dtype):
    inputs = draw(dtype=dtype, prompts=torch.float32 if masters else None, shared=shared)
    # Rounding masters is part of the operator.
    rounded = [t.to(dtype) for t in inputs]
    dout = torch.randn(2, 3, 19, 64).to(dtype)
    out, gradients = attend(inputs, dout, dtype, "cuda", causal=causal)
    exact_out, exact = attend(rounded, dout, torch.float64, "reference", causal=causal)
    plain_out, plain = attend(inputs, dout, dtype, "reference", causal=causal)
    assert out.dtype == dtype and out.transpose(1, 2).is_contiguous()
    assert_close("out", out.detach(), plain_out.detach(), exact_out.detach())
    names = ("dfused", "dprompt_k", "dprompt_v")
    for name, value, ours, want, t in zip(names, gradients, plain, exact, inputs, strict=True):
        assert value.dtype == t.dtype and value.shape == t.shape
        assert_close(name, value.to(dtype), ours.to(dtype), want)


def test_gradients_of_one_projection_lie_side_by_side(chip):
    fused, prompt_k, prompt_v = draw()
    q, k, v = (t.requires_grad_() for t in parts(fused))
    out = prompt_attention(q, k, v, prompt_k, prompt_v, backend="cuda")
    gradients = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert len({g.untyped_storage().data_ptr() for g in gradients}) == 1
    width = 3 * 64
    assert [g.storage_offset() for g in gradients] == [0, width, 2 * width]
    assert all(g.stride() == q.stride() and g.isfinite().all() for g in gradients)


def test_packed_equals_apart(chip):
    fused, prompt_k, prompt_v = draw()
    q, k, v = parts(fused)
    out, lse = cuda_attention.forward(q, k, v, prompt_k, prompt_v, scale=0.125)
    dout = torch.randn_like(out)
    arguments = (dout, q, k, v, prompt_k, prompt_v, out, lse)
    apart = cuda_attention.backward(*arguments, scale=0.125)
    packed = torch.empty(2, 19, 3, 3, 64, dtype=q.dtype)
    beside = cuda_attention.backward(*arguments, scale=0.125, packed=packed)
    assert all(torch.equal(a, b) for a, b in zip(apart, beside, strict=True))
    assert all(g.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr() for g in beside[:3])
    for wrong in (packed[:, :18], packed.float(), packed.transpose(1, 2)):
        with pytest.raises(RuntimeError, match="packed"):
            cuda_attention.backward(*arguments, scale=0.125, packed=wrong)


def test_no_prompts(chip):
    q, k, v = parts(draw()[0])
    out, lse = cuda_attention.forward(q, k, v, scale=0.125)
    gradients = cuda_attention.backward(torch.ones_like(out), q, k, v, None, None, out, lse, scale=0.125)
    assert gradients[3:] == (None, None) and all(g.shape == q.shape for g in gradients[:3])
    empty = torch.empty(3, 0, 64, dtype=q.dtype)
    assert torch.equal(out, cuda_attention.forward(q, k, v, empty, empty, scale=0.125)[0])
    gradients = cuda_attention.backward(torch.ones_like(out), q, k, v, empty, empty, out, lse, scale=0.125)
    assert gradients[3].shape == gradients[4].shape == empty.shape


def test_gradients_that_nobody_needs_are_none(chip):
    fused, prompt_k, prompt_v = draw()
    q, k, v = parts(fused)
    out, lse = cuda_attention.forward(q, k, v, prompt_k, prompt_v, scale=0.125)
    arguments = (torch.ones_like(out), q, k, v, prompt_k, prompt_v, out, lse)
    everything = cuda_attention.backward(*arguments, scale=0.125)
    for place in range(5):
        needs = tuple(i == place for i in range(5))
        found = cuda_attention.backward(*arguments, scale=0.125, needs=needs)
        assert [g is not None for g in found] == list(needs)
        assert torch.equal(found[place], everything[place])
    assert cuda_attention.backward(*arguments, scale=0.125, needs=(False,) * 5) == (None,) * 5


def test_gradients_of_the_output_in_any_layout(chip):
    q, k, v = parts(draw()[0])
    out, lse = cuda_attention.forward(q, k, v, scale=0.125)
    dout = torch.randn_like(out)
    want = cuda_attention.backward(dout, q, k, v, None, None, out, lse, scale=0.125)
    odd = torch.empty(2, 3, 19, 65, dtype=dout.dtype)[..., 1:].copy_(dout)
    for other in (dout.contiguous(), odd, dout.transpose(2, 3).contiguous().transpose(2, 3)):
        found = cuda_attention.backward(other, q, k, v, None, None, out, lse, scale=0.125)
        assert all(torch.equal(a, b) for a, b in zip(want[:3], found[:3], strict=True))
    one = torch.ones((), dtype=dout.dtype).expand(dout.shape)
    found = cuda_attention.backward(one, q, k, v, None, None, out, lse, scale=0.125)
    want = cuda_attention.backward(torch.ones_like(out), q, k, v, None, None, out, lse, scale=0.125)
    assert all(torch.equal(a, b) for a, b in zip(want[:3], found[:3], strict=True))


ATTENTION_REFUSALS = {
    "all fp16 or all bf16, not torch.float32": lambda q, k, v: ((q.float(), k.float(), v.float()), {}),
    "torch.bfloat16, torch.float16": lambda q, k, v: ((q, k.half(), v), {}),
    "one of 32, 64, 80, 96, 128, not 72": lambda q, k, v: (
        tuple(torch.randn(2, 3, 4, 72).bfloat16() for _ in "qkv"),
        {},
    ),
    "multiples of 16 bytes": lambda q, k, v: ((torch.randn(2, 3, 19, 68).bfloat16()[..., 1:65], k, v), {}),
    "rows of q, k and v must be contiguous": lambda q, k, v: (
        (q, torch.randn(2, 3, 64, 19).bfloat16().transpose(2, 3), v),
        {},
    ),
    "scale must be positive, not 0.0": lambda q, k, v: ((q, k, v), {"scale": 0.0}),
    "mask or bias": lambda q, k, v: ((q, k, v), {"bias": torch.zeros(19, 19)}),
    "dropout": lambda q, k, v: ((q, k, v), {"dropout": 0.1}),
    "from a bank": lambda q, k, v: ((q, k, v), {"prompt_index": torch.zeros(2, dtype=torch.int64)}),
    "given together": lambda q, k, v: ((q, k, v, k[0]), {}),
    "prompts must be": lambda q, k, v: ((q, k, v, k[:, :2], v[:, :2]), {}),
    "prompts must be (H, p, D) or (B, H, p, D)": lambda q, k, v: ((q, k, v, k[:1], v[:1]), {}),
    "floating-point dtype, not torch.int64": lambda q, k, v: ((q, k, v, k[0].long(), v[0]), {}),
    "q is on cpu, and other tensors are on meta": lambda q, k, v: ((q, k.to("meta"), v), {}),
    "no query or no key": lambda q, k, v: ((q[:, :, :0], k, v), {}),
    "there is no query": lambda q, k, v: ((q, k[:, :, :0], v[:, :, :0]), {}),
    "q, k and v must be (B, H, Nq, D)": lambda q, k, v: ((q[0], k, v), {}),
}


@pytest.mark.parametrize("words", ATTENTION_REFUSALS)
def test_what_attention_refuses(chip, words):
    arguments, options = ATTENTION_REFUSALS[words](*(t.contiguous() for t in parts(draw()[0])))
    found = cuda_attention.reasons(*arguments, **{"scale": 0.125, **options})
    assert len(found) == 1 and words in found[0], found
    if not {"bias", "dropout", "prompt_index"} & set(options) and not any(
        w in words for w in ("together", "int64", "meta")
    ):
        with pytest.raises(RuntimeError, match="fastpeft_cuda: "):
            cuda_attention.forward(*arguments, **{"scale": 0.125, **options})


def test_what_attention_takes(chip):
    q, k, v = parts(draw()[0])
    prompts = torch.randn(3, 5, 64)
    for given in ((), (prompts, prompts), (prompts.half(), prompts), (prompts[:, :0], prompts[:, :0])):
        assert cuda_attention.reasons(q, k, v, *given, scale=0.125) == []
    assert cuda_attention.reasons(q, k, v, scale=0.125, causal=True) == []


def test_a_refusal_is_an_error_that_names_it(chip):
    q, k, v = parts(draw()[0])
    with pytest.raises(BackendError, match="cuda: a mask or bias is not supported"):
        prompt_attention(q, k, v, attn_mask=torch.zeros(19, 19, dtype=q.dtype), backend="cuda")


# ---- Adapter ----


def factors_of(hidden, dtype, width=72, bias=True):
    down, up = torch.randn(hidden, width) / width**0.5, torch.randn(width, hidden) / hidden**0.5
    biases = (torch.randn(hidden), torch.randn(width)) if bias else (None, None)
    return [None if t is None else t.to(dtype) for t in (down, biases[0], up, biases[1])]


def adapt(x, factors, residual, dy, dtype, backend, activation="gelu", scale=0.5):
    """(y, gradients of x, the factors, and a residual that is not x)"""
    exact = dtype == torch.float64
    x = x.detach().to(dtype if exact else x.dtype).requires_grad_()
    factors = [None if t is None else t.detach().to(dtype if exact else t.dtype).requires_grad_() for t in factors]
    other = None
    if residual == "other":
        other = torch.ones_like(x).requires_grad_()
    beside = {"none": None, "skip": x, "other": other}[residual]
    y = adapter(x, *factors, activation, scale, beside, backend)
    wanted = [t for t in (x, *factors, other) if t is not None]
    return y.detach(), torch.autograd.grad(y, wanted, dy.to(y.dtype)), wanted


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("residual", ["none", "skip", "other"])
@pytest.mark.parametrize("hidden, bias", [(1, True), (13, True), (64, False), (128, True)])
def test_adapter(chip, hidden, bias, residual, masters, dtype):
    x, factors = torch.randn(2, 9, 72).to(dtype), factors_of(hidden, torch.float32 if masters else dtype, bias=bias)
    rounded = [None if t is None else t.to(dtype) for t in factors]
    dy = torch.randn(x.shape).to(dtype)
    y, gradients, wanted = adapt(x, factors, residual, dy, dtype, "cuda")
    exact_y, exact, _ = adapt(x, rounded, residual, dy, torch.float64, "reference")
    plain_y, plain, _ = adapt(x, factors, residual, dy, dtype, "reference")
    assert_close("y", y, plain_y, exact_y)
    for place, (value, ours, want, t) in enumerate(zip(gradients, plain, exact, wanted, strict=True)):
        assert value.dtype == t.dtype and value.shape == t.shape
        assert_close(f"gradient {place}", value.to(dtype), ours.to(dtype), want)


def test_adapter_gradients_that_nobody_needs(chip):
    x, factors = torch.randn(9, 72).bfloat16(), factors_of(16, torch.bfloat16)
    arguments = (torch.ones_like(x), x, *factors, "gelu", 1.0)
    everything = cuda_adapter.backward(*arguments, skip=False)
    inputs = cuda_adapter.backward(*arguments, skip=False, needs_weights=False)
    assert torch.equal(inputs[0], everything[0]) and inputs[1:] == (None,) * 4
    weights = cuda_adapter.backward(*arguments, skip=False, needs_x=False)
    assert weights[0] is None and all(torch.equal(a, b) for a, b in zip(weights[1:], everything[1:], strict=True))
    assert cuda_adapter.backward(*arguments, skip=False, needs_x=False, needs_weights=False) == (None,) * 5


ADAPTER_REFUSALS = {
    "fp16 or bf16, not torch.float32": lambda x, f: ((x.float(), *f, "gelu", 1.0), None),
    "multiple of 8, not 70": lambda x, f: (
        (x[:, :70], *factors_of(8, torch.float32, 70), "gelu", 1.0),
        None,
    ),
    "'tanh' is not one of": lambda x, f: ((x, *f, "tanh", 1.0), None),
    "there are 129 hidden units": lambda x, f: ((x, *factors_of(129, torch.float32), "gelu", 1.0), None),
    "not one or more rows": lambda x, f: ((x[:0], *f, "gelu", 1.0), None),
    "up_weight is torch.bfloat16 (64, 16)": lambda x, f: ((x, *f[:2], f[2][:64], f[3], "gelu", 1.0), None),
    "down_bias is torch.int64": lambda x, f: ((x, f[0], f[1].long(), *f[2:], "gelu", 1.0), None),
    "the residual is torch.float32": lambda x, f: ((x, *f, "gelu", 1.0), x.float()),
    "rows of x must be": lambda x, f: ((x.t().contiguous().t(), *f, "gelu", 1.0), None),
    "rows of the residual must be": lambda x, f: ((x, *f, "gelu", 1.0), torch.randn(9, 73).bfloat16()[:, 1:]),
}


@pytest.mark.parametrize("words", ADAPTER_REFUSALS)
def test_what_the_adapter_refuses(chip, words):
    x, factors = torch.randn(9, 72).bfloat16(), factors_of(16, torch.bfloat16)
    arguments, residual = ADAPTER_REFUSALS[words](x, factors)
    found = cuda_adapter.reasons(*arguments, residual=residual)
    assert len(found) == 1 and words in found[0], found
    assert cuda_adapter.reasons(x, *factors, "gelu", 1.0, residual=x) == []


# ---- The library ----


def test_alignment():
    x = torch.randn(4, 6, 64).bfloat16()
    assert _cuda.aligned(x) and _cuda.aligned(x[:, ::2]) and _cuda.aligned(x[..., 8:40]) and _cuda.aligned(x[:0])
    assert not _cuda.aligned(x[..., 1:]) and not _cuda.aligned(x.transpose(1, 2)) and not _cuda.aligned(x[..., ::2])
    assert not _cuda.aligned(torch.randn(4, 20).bfloat16()) and _cuda.aligned(torch.randn(1, 20).bfloat16())
    assert _cuda.aligned(torch.randn(1, 20).bfloat16().expand(4, 20)), "a stride of zero repeats a row"
    for other in (x, x[..., 1:57], torch.randn(4, 64, 8).bfloat16().mT, x[..., ::2], x[..., :56]):
        same = _cuda.realigned(other)
        assert _cuda.aligned(same) and torch.equal(same, other)


def test_the_operators_check_their_arguments(operators):
    q = torch.randn(1, 2, 7, 64).bfloat16()
    out, lse = operators.prompt_attention_forward(q, q, q, None, None, 0.125, False)
    for arguments, words in (
        ((q, q, q[:, :, :6], None, None, 0.125, False), r"v has shape \(1, 2, 6, 64\), expected \(1, 2, 7, 64\)"),
        ((q, q, q.half(), None, None, 0.125, False), "v has another dtype"),
        ((q, q, q, q[0], None, 0.125, False), "prompt_k and prompt_v go together"),
        ((q, q, q, None, None, 0.0, False), "scale must be positive"),
    ):
        with pytest.raises(RuntimeError, match=words):
            operators.prompt_attention_forward(*arguments)
    for wrong in (lse[:, :, :6], lse.bfloat16(), lse.transpose(1, 2).contiguous().transpose(1, 2)):
        with pytest.raises(RuntimeError, match="lse"):
            operators.prompt_attention_backward(q, q, q, q, None, None, out, wrong, 0.125, False, 7)
    with pytest.raises(RuntimeError, match="there are no prompts"):
        operators.prompt_attention_backward(q, q, q, q, None, None, out, lse, 0.125, False, 8)
