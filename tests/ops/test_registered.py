"""The operators as torch.library knows them, by their references: schema, fake tensors, derivative."""

from __future__ import annotations

import pytest
import torch

from fastpeft import _native
from fastpeft.ops import choose, registered
from fastpeft.ops.adapter import reference as plain_adapter
from fastpeft.ops.dropout_mask import attention_words
from fastpeft.ops.layer_norm import reference as plain_add_layer_norm
from fastpeft.ops.lora_linear import reference as plain_lora_linear
from fastpeft.ops.lora_linear import terms_from
from fastpeft.ops.mlp import reference as plain_mlp
from fastpeft.ops.prompt_attention import Words, prompt_attention

OPERATORS = torch.ops.fastpeft


def random(*shape: int, trained: bool = True) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(trained)


def attention_cases():
    q, k, v = (random(2, 3, n, 8) for n in (4, 5, 5))
    words = attention_words(torch.tensor(1), torch.tensor(2), 3, (0, 2), 3, 4, 7)
    shared, each, bank = ([random(*shape, 2, 8) for _ in range(2)] for shape in ((3,), (2, 3), (4, 3)))
    index = torch.tensor([3, 1])
    bias = random(2, 1, 4, 5, trained=False)
    nothing = (None, None)
    yield "tokens alone", (q, k, v, *nothing, None, False, 0.3, 0.0, *nothing, None)
    yield "shared", (q, k, v, *shared, None, False, 0.3, 0.0, *nothing, None)
    yield "each", (q, k, v, *each, bias, False, 0.3, 0.0, *nothing, None)
    yield "bank", (q, k, v, *bank, None, True, 0.3, 0.0, *nothing, index)
    yield "dropout", (q, k, v, *shared, None, False, 0.3, 0.25, *words, None)


def layer_norm_cases():
    x, branch, weight, bias = random(2, 3, 8), random(2, 3, 8), random(8), random(8)
    gamma = random(8, trained=False)
    yield "alone", (x, None, None, weight, bias, 1e-6)
    yield "sum", (x, branch, None, weight.detach(), bias, 1e-6)
    yield "scaled sum", (x, branch, gamma, weight, bias.detach(), 1e-6)
    yield "no affine", (x, branch, gamma, None, None, 1e-6)


def lora_linear_cases():
    x, weight, bias = random(2, 3, 8), random(12, 8, trained=False), random(12, trained=False)
    factors = [random(2, 8), random(4, 2), random(3, 8), random(4, 3)]
    yield "two terms", (x, weight, bias, factors, [0.5, 2.0], [0, 8], [4, 12])
    yield "one term", (x.detach(), weight, None, [random(2, 8), random(12, 2)], [1.5], [0], [12])


def adapter_cases():
    x, residual = random(2, 3, 8), random(2, 3, 8)
    down, up = (random(4, 8), random(4)), (random(8, 4), random(8))
    yield "alone", (x, *down, *up, "gelu", 1.0, None)
    yield "beside", (x, down[0], None, up[0], None, "relu", 0.5, residual)


def mlp_cases():
    x = random(2, 3, 8)
    weights = [random(*shape, trained=False) for shape in ((16, 8), (16,), (8, 16), (8,))]
    yield "all", (x, *weights, "gelu", "preactivation")
    yield "again", (x, *weights, "silu", "nothing")


CASES = {
    "prompt_attention": attention_cases,
    "add_layer_norm": layer_norm_cases,
    "lora_linear": lora_linear_cases,
    "adapter": adapter_cases,
    "mlp": mlp_cases,
}
EACH = [pytest.param(name, case, id=f"{name}-{label}") for name, cases in CASES.items() for label, case in cases()]


@pytest.mark.parametrize("name, case", EACH)
def test_opcheck(name, case):
    torch.library.opcheck(getattr(OPERATORS, name).default, (*case, "reference"))


def mixed_cases(weights: torch.dtype, biases: torch.dtype):
    """Forward and backward operators on activations in bf16."""

    def half(*shape):
        return torch.randn(*shape).bfloat16()

    def weight(*shape):
        return torch.randn(*shape).to(weights)

    def bias(*shape):
        return torch.randn(*shape).to(biases)

    x, dy = half(2, 3, 8), half(2, 3, 8)
    affine = (bias(8), weight(8), bias(8))
    factors = (weight(4, 8), bias(4), weight(8, 4), bias(8))
    yield "add_layer_norm", (x, half(2, 3, 8), *affine, 1e-6)
    yield "add_layer_norm_backward", (dy, dy, x, *affine, torch.zeros(6), torch.ones(6), 1e-6, [True] * 4)
    yield "adapter", (x, *factors, "gelu", 0.5, None)
    yield "adapter_backward", (dy, x, *factors, "gelu", 0.5, [True] * 5)
    terms = [weight(2, 8), bias(8, 2)], [0.5], [0], [8]
    yield "lora_linear", (x, half(8, 8), None, *terms)
    yield "lora_linear_backward", (dy, x, half(8, 8), half(6, 2), *terms, True, True)


@pytest.mark.parametrize("biases", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_what_is_traced_has_the_types_of_what_is_run(backend, weights, biases):
    for name, case in mixed_cases(weights, biases):
        owner = (name.removesuffix("_backward").removeprefix("add_"), backend)
        if backend == "reference" or (owner in choose._MODULES and _native.library() is not None):
            operator = getattr(OPERATORS, name).default
            torch.library.opcheck(operator, (*case, backend), test_utils=("test_schema", "test_faketensor"))


PLAIN = {
    "prompt_attention": lambda q, k, v, pk, pv, bias, causal, scale, dropout, rows, columns, index: prompt_attention(
        q, k, v, pk, pv, bias, causal, scale, dropout, rows if rows is None else Words(rows, columns), index
    ),
    "add_layer_norm": plain_add_layer_norm,
    "lora_linear": lambda x, weight, bias, factors, scales, starts, stops: plain_lora_linear(
        x, weight, bias, terms_from(factors, scales, starts, stops), [len(weight)]
    )[0],
    "adapter": plain_adapter,
    "mlp": lambda *arguments: plain_mlp(*arguments[:-1]),
}


def leaves(case) -> list[torch.Tensor]:
    flat = [t for argument in case for t in (argument if isinstance(argument, list) else [argument])]
    return [t for t in flat if isinstance(t, torch.Tensor) and t.requires_grad]


def results(function, case):
    outs = function(*case)
    outs = [outs] if isinstance(outs, torch.Tensor) else [out for out in outs if out.requires_grad]
    torch.manual_seed(1)
    douts = [torch.randn(out.shape, dtype=out.dtype) for out in outs]
    return outs, torch.autograd.grad(outs, leaves(case), douts)


@pytest.mark.parametrize("name, case", EACH)
def test_outputs_and_gradients_are_the_plain_operators(name, case):
    found = results(lambda *arguments: getattr(registered, name)(*arguments, "reference"), case)
    if name == "prompt_attention":
        found = results(lambda *arguments: registered.prompt_attention(*arguments, "reference")[0], case)
    expected = results(PLAIN[name], case)
    for mine, theirs in zip(found, expected, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("keep, bound", [("preactivation", 1e-12), ("nothing", 1e-12), ("derivative8", 3e-3)])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "silu", "relu"])
def test_what_the_mlp_keeps_gives_its_derivative(activation, keep, bound):
    x, *weights = next(iter(mlp_cases()))[1][:5]
    exact, found = (
        torch.autograd.grad(y.sum(), x)[0]
        for y in (plain_mlp(x, *weights, activation), registered.mlp(x, *weights, activation, keep, "reference"))
    )
    error = float((found - exact).norm() / exact.norm())
    assert error <= bound
    if keep == "derivative8" and activation != "relu":
        assert error > 1e-6, "eight bits cannot be this exact: they were not used"


def test_derivatives_fit_into_their_eight_bits():
    from fastpeft.ops.activation import FUNCTIONS
    from fastpeft.ops.mlp import DERIVATIVE_LOW, DERIVATIVE_STEP

    z = torch.linspace(-30, 30, 600_001, dtype=torch.float64).requires_grad_()
    for name, function in FUNCTIONS.items():
        (slope,) = torch.autograd.grad(function(z).sum(), z)
        assert slope.min() >= DERIVATIVE_LOW and slope.max() <= DERIVATIVE_LOW + 255 * DERIVATIVE_STEP, name
