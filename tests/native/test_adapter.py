"""The bottleneck adapter: values and every gradient against float64, on every instruction set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.native.vector import adapter
from fastpeft.ops import adapter as operator
from fastpeft.ops.activation import FUNCTIONS
from tests.kernels.close import assert_close, error

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAMES = ("x", "down_weight", "down_bias", "up_weight", "up_bias")
DTYPES = (torch.float32, torch.bfloat16)


def draw(rows, d, hidden, dtype, factors=None, biases=True) -> dict[str, Tensor | None]:
    """x, the factors, and an upstream gradient."""
    factors = factors or dtype
    return {
        "x": torch.randn(rows, d).to(dtype),
        "down_weight": (torch.randn(hidden, d) * d**-0.5).to(factors),
        "down_bias": torch.randn(hidden).to(factors) if biases else None,
        "up_weight": (torch.randn(d, hidden) * hidden**-0.5).to(factors),
        "up_bias": torch.randn(d).to(factors) if biases else None,
        "dy": torch.randn(rows, d).to(dtype),
    }


def plain(case, activation, scale, residual, skip, dtype) -> dict[str, Tensor]:
    """The equation and autograd's gradients in one precision."""
    leaves = {name: None if case[name] is None else case[name].detach().to(dtype).requires_grad_() for name in NAMES}
    x = leaves["x"]
    h = FUNCTIONS[activation](F.linear(x, leaves["down_weight"], leaves["down_bias"]))
    y = F.linear(h, leaves["up_weight"], leaves["up_bias"]) * scale
    y = y + x if skip else y if residual is None else y + residual.to(dtype)
    y.backward(case["dy"].to(dtype))
    return {"y": y.detach()} | {f"d{name}": t.grad for name, t in leaves.items() if t is not None}


def check(case, activation="gelu", scale=1.0, residual=None, skip=False) -> None:
    """Compare everything with float64."""
    factors = [case[name] for name in NAMES]
    beside = case["x"] if skip else residual
    assert not adapter.reasons(*factors, activation, scale, residual=beside)
    found = {"y": adapter.forward(*factors, activation, scale, residual=beside)}
    gradients = adapter.backward(case["dy"], *factors, activation, scale, skip=skip)
    found |= {f"d{name}": t for name, t in zip(NAMES, gradients, strict=True) if t is not None}
    exact = plain(case, activation, scale, residual, skip, torch.float64)
    baseline = plain(case, activation, scale, residual, skip, case["x"].dtype)
    assert found.keys() == exact.keys()
    for name, value in found.items():
        assert value.dtype == case.get(name[1:], case["x"]).dtype, name
        assert_close(name, value.to(case["x"].dtype), baseline[name], exact[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_activations(level, activation, dtype):
    if activation == "relu" and dtype == torch.bfloat16:
        pytest.skip("a rounding moves some hidden units across the kink, in one way here and in another there")
    check(draw(40, 48, 24, dtype), activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, d, hidden", [(5, 33, 7), (50, 64, 64), (33, 100, 1), (20, 16, 130)])
def test_sizes(level, rows, d, hidden, dtype):
    check(draw(rows, d, hidden, dtype), scale=0.3, skip=True)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_what_is_beside_the_products(level, skip, biases):
    for dtype in DTYPES:
        case = draw(30, 40, 12, dtype, biases=biases)
        check(case, "relu", 2.0, skip=skip)
        if not skip:
            check(case, residual=torch.randn(30, 80).to(dtype)[:, 3:43])
            check(case, residual=torch.randn(40, 30).to(dtype).t())


def test_factors_in_fp32(level):
    check(draw(30, 40, 12, torch.bfloat16, torch.float32), skip=True)


def test_an_upstream_gradient_of_one_number(level):
    case = draw(30, 40, 12, torch.float32)
    case["dy"] = torch.randn(1, 1).expand(30, 40)
    check(case, skip=True)


def test_what_is_not_asked_for():
    case = draw(6, 16, 4, torch.float32)
    factors = [case[name] for name in NAMES]
    arguments = (case["dy"], *factors, "gelu", 1.0)
    assert adapter.backward(*arguments, skip=True, needs_x=False, needs_weights=False) == (None,) * 5
    dx, *rest = adapter.backward(*arguments, skip=True, needs_weights=False)
    assert dx is not None and rest == [None] * 4
    dx, *rest = adapter.backward(*arguments, skip=True, needs_x=False)
    assert dx is None and all(t is not None for t in rest)


def test_what_it_refuses():
    case = draw(6, 16, 4, torch.float32)
    factors = [case[name] for name in NAMES]
    assert not adapter.reasons(*factors, "gelu", 1.0)
    assert "the activation 'tanh'" in adapter.reasons(*factors, "tanh", 1.0)[0]
    assert "the residual is (6, 15)" in adapter.reasons(*factors, "gelu", 1.0, residual=torch.zeros(6, 15))[0]
    factors[1] = factors[1].half()
    assert "down_weight is (4, 16) in torch.float16" in adapter.reasons(*factors, "gelu", 1.0)[0]


@pytest.mark.parametrize("skip", [False, True])
def test_chosen_by_name(skip):
    case = draw(12, 16, 4, torch.float32)
    results = []
    for backend in ("cpu", "reference"):
        leaves = [case[name].clone().requires_grad_() for name in NAMES]
        x = leaves[0].view(3, 4, 16)
        y = operator.adapter(x, *leaves[1:], "gelu", 0.5, x if skip else None, backend)
        y.backward(case["dy"].view(3, 4, 16))
        results.append([y.detach(), *(t.grad for t in leaves)])
    assert all(error(a, b) <= 1e-5 for a, b in zip(*results, strict=True))
