"""What stands beside the products of a frozen MLP: against float64, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastpeft.native.vector import mlp
from fastpeft.ops import mlp as operator
from fastpeft.ops.activation import FUNCTIONS
from tests.kernels.close import assert_close, error

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = (torch.float32, torch.bfloat16)


def plain(x, weight1, bias1, weight2, dy, activation: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """act(x W1^T + b1) and the gradient of its argument for an upstream gradient of act W2^T."""
    x, weight1, bias1, weight2, dy = (None if t is None else t.to(dtype) for t in (x, weight1, bias1, weight2, dy))
    z = torch.nn.functional.linear(x, weight1, bias1).requires_grad_()
    a = FUNCTIONS[activation](z)
    a.backward(dy @ weight2)
    return a.detach(), z.grad


def draw(rows, inner, hidden, dtype, bias_dtype=None):
    """x, weight1, bias1, weight2, dy."""
    x, dy = (torch.randn(rows, inner).to(dtype) for _ in range(2))
    weight1 = (torch.randn(hidden, inner) * inner**-0.5).to(dtype)
    weight2 = (torch.randn(inner, hidden) * hidden**-0.5).to(dtype)
    return x, weight1, torch.randn(hidden).to(bias_dtype or dtype), weight2, dy


def check(case, activation: str, keep: str = "preactivation") -> None:
    """Compare both results with float64."""
    x, weight1, bias1, weight2, dy = case
    assert not mlp.reasons(x, weight1, bias1, activation, keep=keep)
    a, kept = mlp.forward(x, weight1, bias1, activation, keep=keep)
    exact_a, exact_dz = plain(*case, activation, torch.float64)
    plain_a, plain_dz = plain(*case, activation, x.dtype)
    assert a.dtype == x.dtype
    assert_close("a", a, plain_a, exact_a)
    if keep == "nothing":
        assert kept is None
        kept = torch.nn.functional.linear(x, weight1, None if bias1 is None else bias1.to(x.dtype))
    dz = mlp.backward_input(dy, weight2, kept, activation, keep=keep)
    assert dz.dtype == x.dtype
    if keep != "derivative8":
        assert_close("dz", dz, plain_dz, exact_dz)
    else:
        assert kept.dtype == torch.uint8
        # Half a step of what the codes stand for, on top of what rounding does.
        limit = (dy.double() @ weight2.double()).abs() * (operator.DERIVATIVE_STEP / 2 + 2e-2) + 2e-2
        assert ((dz.double() - exact_dz).abs() <= limit).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_activations(level, activation, dtype):
    for keep in ("preactivation", "nothing") + (("derivative8",) if dtype == torch.bfloat16 else ()):
        check(draw(9, 24, 83, dtype), activation, keep)


@pytest.mark.parametrize("rows, inner, hidden", [(1, 3, 1), (5, 7, 15), (3, 16, 16), (4, 8, 129), (50, 32, 64)])
def test_sizes(level, rows, inner, hidden):
    check(draw(max(rows, 5), inner, max(hidden, 5), torch.float32), "gelu")
    a, kept = mlp.forward(*draw(rows, inner, hidden, torch.float32)[:3], "gelu")
    assert a.shape == kept.shape == (rows, hidden) and a.isfinite().all()


def test_a_bias_of_another_type_and_none(level):
    check(draw(8, 24, 40, torch.bfloat16, torch.float32), "gelu")
    x, weight1, _, weight2, dy = draw(8, 24, 40, torch.float32)
    check((x, weight1, None, weight2, dy), "silu")


def test_strided_inputs(level):
    _, weight1, bias1, weight2, dy = draw(12, 24, 40, torch.float32)
    wide = torch.randn(12, 50)
    check((wide[:, 3:27], weight1.t().contiguous().t(), bias1, weight2[:, :], dy[:1].expand(12, 24)), "gelu")


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_elementwise_accuracy(level, activation):
    z = torch.cat((torch.linspace(-12, 12, 20001), torch.randn(100) * 1e-3)).view(1, -1)
    exact = z.double().requires_grad_()
    a = FUNCTIONS[activation](exact)
    a.sum().backward()
    kept = torch.empty_like(z)
    value = mlp.activate_(z.clone(), None, activation, kept)
    slope = mlp.differentiate_(torch.ones_like(z), kept, activation)
    assert torch.equal(kept, z)
    # 5 units in the last place where the value is not the small difference that it is far to the left.
    assert ((value - a).abs() <= 6e-7 * a.abs() + 2e-7).all()
    assert ((slope - exact.grad).abs() <= 6e-7).all()


def test_codes_are_those_of_the_plain_functions(level):
    for activation in FUNCTIONS:
        x, weight1, bias1, *_ = draw(40, 16, 50, torch.bfloat16)
        z, ours = torch.empty(40, 50, dtype=torch.bfloat16), torch.empty(40, 50, dtype=torch.uint8)
        torch.addmm(bias1, x, weight1.t(), out=z)
        mlp.activate_(z.clone(), None, activation, ours)
        exact = z.double().requires_grad_()
        FUNCTIONS[activation](exact).sum().backward()
        found = ours.double() * operator.DERIVATIVE_STEP + operator.DERIVATIVE_LOW
        assert (found - exact.grad).abs().max() <= operator.DERIVATIVE_STEP * 0.5001, activation


def test_hidden_units_beside_the_gradient(level):
    gradient, z, bias = torch.randn(7, 37), torch.randn(7, 37), torch.randn(37)
    exact = (z + bias).double().requires_grad_()
    a = FUNCTIONS["gelu"](exact)
    a.backward(0.5 * gradient.double())
    kept = z.clone()
    dz = mlp.differentiate_(gradient.clone(), kept, "gelu", bias=bias, scale=0.5, hidden=True)
    assert error(dz, exact.grad) <= 1e-6 and error(kept, a.detach()) <= 1e-6


def test_what_it_refuses():
    x, weight1, bias1, *_ = draw(4, 8, 16, torch.float32)
    assert "8 bits of a derivative are too few" in mlp.reasons(x, weight1, bias1, "gelu", keep="derivative8")[0]
    assert "activation 'tanh'" in mlp.reasons(x, weight1, bias1, "tanh")[0]
    assert "the bias is (15,)" in mlp.reasons(x, weight1, bias1[:15], "gelu")[0]
    assert "the weight is torch.bfloat16" in mlp.reasons(x, weight1.bfloat16(), bias1, "gelu")[0]
    assert mlp.reasons(x[None], weight1, bias1, "gelu") and not mlp.reasons(x, weight1, bias1, "gelu")


@pytest.mark.parametrize("keep", operator.KEEPS)
def test_chosen_by_name(keep):
    dtype = torch.bfloat16 if keep == "derivative8" else torch.float32
    x, weight1, bias1, weight2, dy = draw(6, 24, 40, dtype)
    results = []
    for backend in ("cpu", "reference"):
        leaf = x.clone().requires_grad_()
        y = operator.mlp(leaf.view(2, 3, 24), weight1, bias1, weight2, None, "gelu", keep, backend)
        y.backward(dy.view(2, 3, 24))
        results.append((y.detach(), leaf.grad))
    assert all(error(a, b) <= (2e-2 if dtype == torch.bfloat16 else 1e-5) for a, b in zip(*results, strict=True))
