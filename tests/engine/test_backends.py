"""A model on Triton's kernels, interpreted, against the same model on the reference; and which kernels ran."""

from __future__ import annotations

import copy

import pytest
import torch

import fastpeft
from fastpeft.ops import choose
from fastpeft.ops.choose import BackendError, Chip
from fastpeft.ops.lora_linear import LowRankTerm, lora_linear
from tests.kernels.close import error
from tests.thinned import paired, thinned
from tests.tiny import METHODS, images, patched, vit

pytest.importorskip("triton")

# Method -> operators whose kernels it must reach.
REACHES = {
    "vpt-deep": {"prompt_attention", "layer_norm", "mlp"},
    "lora-all": {"prompt_attention", "layer_norm", "lora_linear"},
    "adapter": {"prompt_attention", "layer_norm", "mlp", "adapter"},
    "serial": {"prompt_attention", "layer_norm", "mlp", "adapter"},
    "prefix-kv": {"prompt_attention", "layer_norm", "mlp"},
    "bitfit": {"prompt_attention", "layer_norm"},
}


def step(model, x):
    logits = model(x)
    torch.manual_seed(5)
    (logits * torch.randn_like(logits)).sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(logits, gradients, expected, others, bound=1e-4):
    """Relative errors in the norm: single elements of a sum over cancelling terms may differ by more."""
    assert error(logits, expected) <= bound
    assert gradients.keys() == others.keys()
    wrong = {name: error(gradient, others[name]) for name, gradient in gradients.items()}
    assert max(wrong.values()) <= bound, {name: value for name, value in wrong.items() if value > bound}


@pytest.mark.parametrize("method, variant", thinned(paired([*REACHES], ["class_token", "layer_scale", "registers"]), 4))
def test_a_step_on_the_kernels_is_the_references(method, variant, calls):
    model = patched(METHODS[method], variant)
    twin = copy.deepcopy(model)
    fastpeft.patch(model, backend="triton")
    model.train(), twin.train()
    x = images(variant).float()
    logits, gradients = step(model, x)
    expected, others = step(twin, x)
    assert_same(logits, gradients, expected, others)
    assert REACHES[method] <= calls["forward"] and REACHES[method] <= calls["backward"]


def test_nothing_runs_on_a_kernel_unless_asked_for(calls):
    step(patched(METHODS["lora-all"]).train(), images())
    assert not calls["forward"] and not calls["backward"]


def test_a_bias_of_factors_that_is_trained(calls):
    """peft's lora_bias: its gradient is none of the kernel's."""
    x, weight = torch.randn(5, 32), torch.randn(48, 32)
    a, b, bias = (torch.randn(*shape, requires_grad=True) for shape in ((4, 32), (16, 4), (16,)))
    found = {}
    for backend in ("reference", "triton"):
        (y,) = lora_linear(x, weight, None, [LowRankTerm(a, b, 0.5, 16, 32, None, bias)], [48], backend)
        torch.manual_seed(0)
        found[backend] = torch.autograd.grad((y * torch.randn_like(y)).sum(), (a, b, bias))
    assert all(torch.equal(one, other) for one, other in zip(*found.values(), strict=True))
    with torch.no_grad():
        (y,) = lora_linear(x, weight, None, [LowRankTerm(a, b, 0.5, 16, 32, None, bias)], [48], "triton")
    assert calls["forward"] == {"lora_linear"}, "without a gradient it is a bias like any other"


def test_one_operator_alone_by_the_environment(calls, monkeypatch):
    monkeypatch.setenv("FASTPEFT_BACKEND_LAYER_NORM", "triton")
    step(patched(METHODS["vpt-deep"]).train(), images())
    assert calls["forward"] == calls["backward"] == {"layer_norm"}


def test_switching_a_patched_model(calls):
    model = fastpeft.patch(patched(METHODS["vpt-deep"]).eval(), backend="reference")
    with torch.no_grad():
        before = model(images())
        fastpeft.patch(model, backend="triton")
        assert error(model(images()), before) <= 1e-5 and "mlp" in calls["forward"]
        calls["forward"].clear()
        fastpeft.patch(model, backend="reference")
        assert torch.equal(model(images()), before) and not calls["forward"]
    assert fastpeft.summary(model).backends["mlp"] == "reference"


@pytest.mark.parametrize("method", thinned(["adapter", "lora-all", "vpt-deep"], 3))
def test_compiled_without_a_break_in_the_graph(method):
    model = patched(METHODS[method]).train()
    twin = copy.deepcopy(model)
    fastpeft.patch(model, backend="triton")
    expected, others = step(twin, images())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits = compiled(images())
    torch.manual_seed(5)
    (logits * torch.randn_like(logits)).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same(logits.detach(), gradients, expected, others)


@pytest.mark.parametrize("method", thinned(["adapter", "lora-all", "vpt-deep"], 3))
def test_autocast_gives_kernels_what_it_gives_products(method):
    ours, plain = {}, {}
    for draw in range(3):
        model = patched(METHODS[method], seed=draw).train()
        logits, slopes = step(copy.deepcopy(model), images(seed=draw))
        slopes["logits"] = logits
        for errors, backend in ((ours, "triton"), (plain, "reference")):
            fastpeft.patch(twin := copy.deepcopy(model), backend=backend)
            with torch.autocast("cpu", torch.float16):
                logits, gradients = step(twin, images(seed=draw))
            assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
            for name, value in ({"logits": logits} | gradients).items():
                errors[name] = errors.get(name, 0.0) + error(value, slopes[name])
    wrong = {name: (ours[name], plain[name]) for name in ours if not ours[name] <= 2 * plain[name]}
    assert not wrong, "relative errors (kernels, reference), summed over draws"


def test_what_cannot_run_is_an_error_that_says_why():
    model = fastpeft.patch(vit(), backend="triton")
    with choose.emulated(Chip("cuda", 70)), pytest.raises(BackendError, match=r"needs compute capability 7\.5"):
        model(images())
