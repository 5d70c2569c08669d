"""What is asked of xformers and how it is called, on a stand-in; and the real one where it is installed."""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
import types
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from fastpeft.ops import choose, prompt_attention, xformers_attention
from fastpeft.ops.choose import BackendError, Chip, emulated

INSTALLED = importlib.util.find_spec("xformers") is not None


# ---- A stand-in, with signatures as in xformers 0.0.35 ----


@dataclass
class Inputs:
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_bias: Any = None
    p: float = 0.0
    scale: float | None = None
    output_dtype: torch.dtype | None = None
    is_partial: bool = False


class LowerTriangularMask:
    pass


def operator(name, refuses=lambda inputs: []):
    return types.SimpleNamespace(NAME=name, not_supported_reasons=refuses)


def attend(inputs: Inputs):
    """(B, M, H, K) as xformers takes it, in float64."""
    q, k, v = (t.double().transpose(1, 2) for t in (inputs.query, inputs.key, inputs.value))
    scores = inputs.scale * q @ k.transpose(-1, -2)
    if inputs.attn_bias is not None:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)


def check(inputs: Inputs):
    q, k, v = inputs.query, inputs.key, inputs.value
    assert q.dim() == k.dim() == v.dim() == 4 and k.shape == v.shape
    assert (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:]), "batch first, heads before the last dimension"
    assert q.dtype == k.dtype == v.dtype and all(t.stride(-1) == 1 for t in (q, k, v))
    assert inputs.attn_bias is None or isinstance(inputs.attn_bias, LowerTriangularMask)


@pytest.fixture
def fmha(monkeypatch):
    """`xformers.ops.fmha`; its lists of refusals can be changed, and what it was called with is in `calls`."""
    module = types.ModuleType("xformers.ops.fmha")
    module.Inputs = Inputs
    module.calls = []
    for name in ("flash3", "flash", "cutlass"):
        kinds = types.SimpleNamespace(FwOp=operator(f"{name} forward"), BwOp=operator(f"{name} backward"))
        setattr(module, name, kinds)

    def forward(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
        inputs = Inputs(query, key, value, attn_bias, p, scale)
        check(inputs)
        module.calls.append(op.NAME)
        out, lse = attend(inputs)
        if op.NAME.startswith("cutlass"):
            lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf)
        return out.to(query.dtype).contiguous(), lse.float()

    def backward(grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        inputs = Inputs(query, key, value, attn_bias, p, scale)
        check(inputs)
        assert grad.shape == output.shape == query.shape and grad.is_contiguous() and grad.dtype == query.dtype
        module.calls.append(op.NAME)
        leaves = [t.detach().double().requires_grad_() for t in (query, key, value)]
        with torch.enable_grad():
            out, wanted = attend(replace(inputs, query=leaves[0], key=leaves[1], value=leaves[2]))
            torch.testing.assert_close(lse.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
            gradients = torch.autograd.grad(out, leaves, grad.double())
        return tuple(g.to(query.dtype) for g in gradients)

    module.memory_efficient_attention_forward_requires_grad = forward
    module.memory_efficient_attention_backward = backward
    module.attn_bias = types.ModuleType("xformers.ops.fmha.attn_bias")
    module.attn_bias.LowerTriangularMask = LowerTriangularMask
    package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
    package.ops, ops.fmha = ops, module
    for name, made in (("", package), (".ops", ops), (".ops.fmha", module), (".ops.fmha.attn_bias", module.attn_bias)):
        monkeypatch.setitem(sys.modules, f"xformers{name}", made)
    return module


def refuse(operator, words):
    operator.not_supported_reasons = lambda inputs: [words]


def draw(length=3, shared=True, dtype=torch.float32, masters=None, rows=9, batch=2, heads=2, dim=8):
    fused = torch.randn(batch, rows, 3, heads, dim).to(dtype)
    q, k, v = (fused[:, :, part].transpose(1, 2) for part in range(3))
    shape = (heads, length, dim) if shared else (batch, heads, length, dim)
    return [q, k, v, *(torch.randn(shape).to(masters or dtype) for _ in range(2))]


# ---- How it is called ----


@pytest.mark.parametrize("kernel", ["flash3", "flash", "cutlass"])
@pytest.mark.parametrize("kind", ["shared", "per-sample", "bank", "none", "causal"])
def test_values_and_gradients(fmha, kind, kernel):
    for name in ("flash3", "flash", "cutlass")[: ("flash3", "flash", "cutlass").index(kernel)]:
        refuse(getattr(fmha, name).FwOp, "too early"), refuse(getattr(fmha, name).BwOp, "too early")
    inputs = draw(shared=kind != "per-sample")
    options = {"scale": 0.3, "causal": kind == "causal"}
    if kind in ("none", "causal"):
        inputs[3:] = [None, None]
    if kind == "bank":
        inputs[3:] = [torch.randn(4, 2, 3, 8) for _ in range(2)]
        options["prompt_index"] = torch.tensor([3, 3])
    assert xformers_attention.reasons(*inputs, **options) == []
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    index = options.get("prompt_index")
    want = prompt_attention.reference(*leaves, None, options["causal"], 0.3, 0.0, None, index)
    dout = torch.randn_like(want)
    wanted = torch.autograd.grad(want, [t for t in leaves if t is not None], dout)
    out, lse = xformers_attention.forward(*inputs, **options)
    assert lse.shape == out.shape[:3]
    torch.testing.assert_close(out, want.detach())
    gradients = xformers_attention.backward(dout, *inputs, out, lse, **options)
    found = [g for g in gradients if g is not None]
    for value, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-5)
    assert fmha.calls == [f"{kernel} forward", f"{kernel} backward"]


@pytest.mark.parametrize("shared", [True, False])
def test_prompts_that_are_masters_take_the_dtype_of_the_tokens(fmha, shared):
    inputs = draw(dtype=torch.bfloat16, masters=torch.float32, shared=shared)
    out, lse = xformers_attention.forward(*inputs, scale=0.3)
    gradients = xformers_attention.backward(out, *inputs, out, lse, scale=0.3)
    assert out.dtype == torch.bfloat16
    assert [g.dtype for g in gradients] == [torch.bfloat16] * 3 + [torch.float32] * 2


def test_a_gradient_of_any_layout(fmha):
    q, k, v, _, _ = draw()
    out, lse = xformers_attention.forward(q, k, v, scale=0.3)
    one = torch.ones(()).expand(out.shape)
    found = xformers_attention.backward(one, q, k, v, None, None, out, lse, scale=0.3)
    want = xformers_attention.backward(torch.ones_like(out), q, k, v, None, None, out, lse, scale=0.3)
    assert all(torch.equal(a, b) for a, b in zip(found[:3], want[:3], strict=True))


def test_gradients_that_nobody_needs(fmha):
    inputs = draw()
    out, lse = xformers_attention.forward(*inputs, scale=0.3)
    found = xformers_attention.backward(out, *inputs, out, lse, scale=0.3, needs=(True, False, False, False, True))
    assert [g is not None for g in found] == [True, False, False, False, True]
    fmha.calls.clear()
    assert xformers_attention.backward(out, *inputs, out, lse, scale=0.3, needs=(False,) * 5) == (None,) * 5
    assert not fmha.calls


def test_other_kernels_forward_and_backward(fmha):
    refuse(fmha.flash3.BwOp, "head dimension")
    refuse(fmha.cutlass.FwOp, "too new")
    inputs = draw()
    out, lse = xformers_attention.forward(*inputs, scale=0.3)
    xformers_attention.backward(out, *inputs, out, lse, scale=0.3)
    assert fmha.calls == ["flash3 forward", "flash backward"]


def test_an_older_xformers_without_some_kernels(fmha):
    del fmha.flash3
    xformers_attention.forward(*draw(), scale=0.3)
    assert fmha.calls == ["flash forward"]


# ---- What it refuses ----


def test_xformers_own_reasons(fmha):
    inputs = draw()
    assert xformers_attention.reasons(*inputs, scale=0.3) == []
    for name in ("flash3", "flash", "cutlass"):
        refuse(getattr(fmha, name).BwOp, f"{name} is not deterministic")
    (found,) = xformers_attention.reasons(*inputs, scale=0.3)
    assert found.startswith("xformers has no backward kernel") and "flash backward: flash is not deterministic" in found
    for name in ("flash3", "flash", "cutlass"):
        refuse(getattr(fmha, name).FwOp, "too new")
    assert len(xformers_attention.reasons(*inputs, scale=0.3)) == 2


@pytest.mark.parametrize(
    "words, options",
    [
        ("mask or bias", {"bias": torch.zeros(9, 9)}),
        ("dropout", {"dropout": 0.1}),
        ("causal mask does not go with prompts", {"causal": True}),
    ],
)
def test_what_is_not_handed_to_it(fmha, words, options):
    (found,) = xformers_attention.reasons(*draw(), scale=0.3, **options)
    assert words in found


def test_dtypes_and_shapes_that_it_does_not_take(fmha):
    q, k, v, *_ = draw()
    assert "no kernel for torch.float64" in xformers_attention.reasons(*(t.double() for t in (q, k, v)), scale=0.3)[0]
    assert "one dtype" in xformers_attention.reasons(q, k.half(), v, scale=0.3)[0]
    (found,) = xformers_attention.reasons(q[:, :, :4], k, v, scale=0.3, causal=True)
    assert "causal" in found


def test_by_name_on_a_gpu_that_is_emulated(fmha, monkeypatch):
    choose.unavailable.cache_clear()
    monkeypatch.setattr(choose.importlib.util, "find_spec", lambda name: object())
    inputs = [t.requires_grad_() for t in draw()]
    with emulated(Chip("cuda", 90)):
        out = prompt_attention.prompt_attention(*inputs, scale=0.3, backend="xformers")
        gradients = torch.autograd.grad(out.square().sum(), inputs)
        refuse(fmha.flash3.FwOp, "no"), refuse(fmha.flash.FwOp, "no"), refuse(fmha.cutlass.FwOp, "too new")
        with pytest.raises(BackendError, match=r"xformers: xformers has no forward kernel .*cutlass forward: too new"):
            prompt_attention.prompt_attention(*inputs, scale=0.3, backend="xformers")
    choose.unavailable.cache_clear()
    want = prompt_attention.prompt_attention(*inputs, scale=0.3, backend="reference")
    wanted = torch.autograd.grad(want.square().sum(), inputs)
    torch.testing.assert_close(out, want)
    for value, exact in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-5)
    assert fmha.calls == ["flash3 forward", "flash3 backward"]


# ---- The real one ----


@pytest.mark.skipif(not INSTALLED, reason="xformers is not installed")
def test_the_stand_in_has_the_interface_of_the_real_one(request):
    from xformers.ops import fmha as real
    from xformers.ops.fmha.attn_bias import LowerTriangularMask as Mask

    stand_in = request.getfixturevalue("fmha")
    for name in ("memory_efficient_attention_forward_requires_grad", "memory_efficient_attention_backward"):
        ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (stand_in, real))
        assert [(p.name, p.kind, p.default) for p in ours.values()] == [
            (p.name, p.kind, p.default) for p in theirs.values()
        ]
    assert list(inspect.signature(Inputs).parameters) == list(inspect.signature(real.Inputs).parameters)
    for name in xformers_attention._KERNELS:
        for direction in ("FwOp", "BwOp"):
            kernel = getattr(getattr(real, name), direction)
            assert Mask in kernel.SUPPORTED_ATTN_BIAS_TYPES and type(None) in kernel.SUPPORTED_ATTN_BIAS_TYPES
            assert kernel.SUPPORTS_CUSTOM_SCALE and isinstance(kernel.NAME, str)


@pytest.mark.skipif(not INSTALLED, reason="xformers is not installed")
def test_the_real_one_says_why_it_does_not_serve_a_cpu():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for inputs in (draw(dtype=dtype, dim=64), draw(dtype=dtype, dim=64, masters=torch.float32)):
            found = xformers_attention.reasons(*inputs, scale=0.3)
            assert len(found) == 2 and all("device=cpu" in words for words in found)
