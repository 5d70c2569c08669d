"""The built library on a chip, against float64. Everything else about the kernels is tested without one."""

from __future__ import annotations

import pytest
import torch

from fastpeft import _cuda
from fastpeft.ops import cuda_adapter, cuda_attention
from fastpeft.ops.activation import FUNCTIONS
from fastpeft.ops.adapter import adapter
from fastpeft.ops.prompt_attention import prompt_attention
from tests.cuda.test_emulated_attention import NAMES, by_torch
from tests.kernels.close import assert_close
from tests.kernels.test_adapter import plain


def obstacle() -> str | None:
    """Why there is nothing to test, or None; the library is opened only where there is a GPU."""
    if not torch.cuda.is_available():
        return "needs a GPU"
    major, minor = torch.cuda.get_device_capability()
    return _cuda.unavailable(10 * major + minor)


REASON = obstacle()
pytestmark = [
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.usefixtures("poisoned_memory"),
]
TYPES = (torch.bfloat16, torch.float16)
HEADS = {32: 4, 64: 12, 80: 16, 96: 4, 128: 4}


def draw(dim, queries, tokens, prompts, dtype, *, batch=3, shared=True):
    heads = HEADS[dim]
    shapes = [(batch, heads, rows, dim) for rows in (queries, tokens, tokens)]
    shapes += [(heads, prompts, dim) if shared else (batch, heads, prompts, dim)] * 2
    return [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]


def check_attention(inputs, causal=False):
    dtype, scale = inputs[0].dtype, inputs[0].shape[-1] ** -0.5
    dout = torch.randn_like(inputs[0])
    # On the CPU, so that the baseline does not depend on what torch does on this chip.
    cpu = [t.cpu() for t in inputs]
    (exact_out, exact_lse), exact = by_torch(cpu, dout.cpu(), scale, causal, torch.float64)
    (plain_out, _), baseline = by_torch(cpu, dout.cpu(), scale, causal, dtype)
    assert cuda_attention.reasons(*inputs, scale=scale, causal=causal) == []
    out, lse = cuda_attention.forward(*inputs, scale=scale, causal=causal)
    gradients = cuda_attention.backward(dout, *inputs, out, lse, scale=scale, causal=causal)
    assert_close("out", out.cpu(), plain_out, exact_out)
    torch.testing.assert_close(lse.cpu().double(), exact_lse, rtol=1e-5, atol=1e-5)
    for name, value, ours, want in zip(NAMES, gradients, baseline, exact, strict=True):
        if want.count_nonzero():
            assert_close(name, value.cpu(), ours, want)
    again = cuda_attention.backward(dout, *inputs, out, lse, scale=scale, causal=causal)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True)), "the same in every run"


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("rows, prompts", [(1, 1), (17, 0), (65, 5), (197, 10), (197, 200), (257, 0), (577, 50)])
@pytest.mark.parametrize("dim", HEADS)
def test_attention(dim, rows, prompts, shared, causal, dtype):
    check_attention(draw(dim, rows, rows, prompts, dtype, shared=shared), causal)


@pytest.mark.parametrize("queries, tokens, prompts", [(1, 197, 50), (197, 1, 0), (64, 0, 33), (300, 77, 3)])
def test_attention_across(queries, tokens, prompts):
    check_attention(draw(64, queries, tokens, prompts, torch.bfloat16))


def test_attention_on_a_fused_projection():
    fused = torch.randn(4, 197, 3, 12, 64, device="cuda").bfloat16()
    q, k, v = (fused[:, :, part].transpose(1, 2) for part in range(3))
    prompts = torch.randn(12, 10, 64, device="cuda").bfloat16()
    check_attention([q, k, v, prompts, prompts.flip(0)])
    out, lse = cuda_attention.forward(q, k, v, prompts, prompts, scale=0.125)
    dout, packed = torch.randn_like(out), torch.empty_like(fused)
    arguments = (dout, q, k, v, prompts, prompts, out, lse)
    apart = cuda_attention.backward(*arguments, scale=0.125)
    beside = cuda_attention.backward(*arguments, scale=0.125, packed=packed)
    assert all(torch.equal(a, b) for a, b in zip(apart, beside, strict=True))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows, width, hidden", [(1, 64, 8), (197, 768, 64), (1000, 1024, 13), (64, 1280, 128)])
@pytest.mark.parametrize("activation, kind", list(zip(FUNCTIONS, ("skip", "none", "other") * 2, strict=True)))
def test_adapter(activation, kind, rows, width, hidden, dtype):
    x, other, dy = (torch.randn(rows, width).to(dtype) for _ in range(3))
    down, up = torch.randn(hidden, width) / width**0.5, torch.randn(width, hidden) / hidden**0.5
    factors = [t.to(dtype) for t in (down, torch.randn(hidden), up, torch.randn(width))]
    exact_y, _, exact = plain(x, factors, activation, 0.5, kind, other, dy, torch.float64)
    plain_y, _, baseline = plain(x, factors, activation, 0.5, kind, other, dy, dtype)
    here, residual = x.cuda(), {"none": None, "other": other.cuda()}
    arguments = (here, *(t.cuda() for t in factors), activation, 0.5)
    y = cuda_adapter.forward(*arguments, residual=here if kind == "skip" else residual[kind])
    assert_close("y", y.cpu(), plain_y, exact_y)
    gradients = cuda_adapter.backward(dy.cuda(), *arguments, skip=kind == "skip")
    for place, (value, ours, want) in enumerate(zip(gradients, baseline, exact, strict=True)):
        assert_close(f"gradient {place}", value.cpu(), ours, want)


def test_work_goes_to_torchs_current_stream():
    q, k, v, prompt_k, prompt_v = draw(64, 577, 577, 50, torch.bfloat16, batch=16)
    want, _ = cuda_attention.forward(q, k, v, prompt_k, prompt_v, scale=0.125)
    other = torch.empty_like(q)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # A kernel on another stream would not wait for this.
        torch.cuda._sleep(50_000_000)
        other.copy_(q)
        out, _ = cuda_attention.forward(other, k, v, prompt_k, prompt_v, scale=0.125)
    stream.synchronize()
    assert torch.equal(out, want)


def test_recorded_in_a_graph():
    q, k, v, prompt_k, prompt_v = draw(80, 257, 257, 10, torch.float16)
    x, factors = torch.randn(64, 768, device="cuda").half(), torch.randn(16, 768, device="cuda").half()
    inputs = (q, k, v, prompt_k, prompt_v)

    def work():
        out, lse = cuda_attention.forward(*inputs, scale=0.1)
        gradients = cuda_attention.backward(out, *inputs, out, lse, scale=0.1)
        return [out, *gradients, cuda_adapter.forward(x, factors, None, factors.t(), None, "gelu", 0.01, residual=x)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = work()
    for t in (*inputs, x):
        t.copy_(torch.randn_like(t))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(recorded, work(), strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_present_one():
    inputs = [t.to("cuda:1") for t in draw(64, 65, 65, 5, torch.bfloat16)]
    with torch.cuda.device(0):
        out, _ = cuda_attention.forward(*inputs, scale=0.125)
        assert torch.cuda.current_device() == 0 and out.device == torch.device("cuda:1")
    here, _ = cuda_attention.forward(*(t.to("cuda:0") for t in inputs), scale=0.125)
    assert torch.equal(out.cpu(), here.cpu())


def test_more_elements_than_32_bits_count():
    free, _ = torch.cuda.mem_get_info()
    if free < 24 << 30:
        pytest.skip("needs 24 GiB of free memory")
    x = torch.empty(2**31 // 768 + 100, 768, device="cuda", dtype=torch.bfloat16).normal_()
    factor = torch.randn(8, 768, device="cuda").bfloat16()
    y = cuda_adapter.forward(x, factor, None, factor.t(), None, "relu", 0.01)
    tail = cuda_adapter.forward(x[-70:].clone(), factor, None, factor.t(), None, "relu", 0.01)
    assert torch.equal(y[-70:], tail)


def test_by_name():
    q, k, v, prompt_k, prompt_v = draw(64, 65, 65, 5, torch.bfloat16)
    out = prompt_attention(q, k, v, prompt_k, prompt_v, backend="cuda")
    reference = prompt_attention(q, k, v, prompt_k, prompt_v, backend="reference")
    torch.testing.assert_close(out, reference, rtol=2e-2, atol=2e-2)
    x, factor = torch.randn(9, 64, device="cuda").bfloat16(), torch.randn(8, 64, device="cuda").bfloat16() / 8
    found = [adapter(x, factor, None, factor.t(), None, "gelu", 1.0, x, backend) for backend in ("cuda", "reference")]
    torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)
