"""LayerNorm with the residual sum before it: values and every gradient against float64, on every instruction set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft.native.vector import layer_norm
from fastpeft.ops.layer_norm import add_layer_norm
from tests.kernels.close import assert_close, error

pytestmark = pytest.mark.usefixtures("poisoned_memory")

EPS = 1e-6
DTYPES = (torch.float32, torch.bfloat16)


def plain(inputs: dict[str, Tensor | None], dy: Tensor, ds: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """The equation and autograd's gradients in one precision."""
    leaves = {name: None if t is None else t.detach().to(dtype).requires_grad_() for name, t in inputs.items()}
    s = leaves["x"]
    if leaves["branch"] is not None:
        s = s + (leaves["branch"] if leaves["gamma"] is None else leaves["branch"] * leaves["gamma"].detach())
    y = F.layer_norm(s, s.shape[-1:], leaves["weight"], leaves["bias"], EPS)
    loss = (y * dy.to(dtype)).sum() + (0.0 if ds is None else (s * ds.to(dtype)).sum())
    loss.backward()
    wanted = ("x", "branch", "weight", "bias")
    return {"s": s.detach(), "y": y.detach()} | {
        f"d{name}": leaves[name].grad for name in wanted if leaves[name] is not None
    }


def ours(inputs: dict[str, Tensor | None], dy: Tensor, ds: Tensor | None) -> dict[str, Tensor]:
    """The same by the functions under test."""
    x, branch, gamma, weight, bias = (inputs[name] for name in ("x", "branch", "gamma", "weight", "bias"))
    y, s, mean, rstd = layer_norm.forward(x, weight, bias, EPS, branch=branch, gamma=gamma)
    needs = {"needs_branch": branch is not None, "needs_weight": weight is not None, "needs_bias": bias is not None}
    dx, dbranch, dbias, dweight = layer_norm.backward(
        dy, s, weight, mean, rstd, ds=ds, gamma=gamma, bias_dtype=None if bias is None else bias.dtype, **needs
    )
    found = {"s": s, "y": y, "dx": dx, "dbranch": dbranch, "dweight": dweight, "dbias": dbias}
    return {name: t for name, t in found.items() if t is not None}


def draw(shape, dtype, branch=True, gamma=True, affine=True, parameters=None, offset=0.0):
    """Inputs and upstream gradients."""
    parameters = parameters or dtype
    inputs = {
        "x": (torch.randn(shape) + offset).to(dtype),
        "branch": torch.randn(shape).to(dtype) if branch else None,
        "gamma": (0.5 + torch.rand(shape[-1])).to(parameters) if branch and gamma else None,
        "weight": (1 + 0.3 * torch.randn(shape[-1])).to(parameters) if affine else None,
        "bias": torch.randn(shape[-1]).to(parameters) if affine else None,
    }
    return inputs, torch.randn(shape).to(dtype), torch.randn(shape).to(dtype) if branch else None


def check(inputs, dy, ds):
    """Compare everything with float64."""
    assert not layer_norm.reasons(
        inputs["x"], inputs["weight"], inputs["bias"], EPS, branch=inputs["branch"], gamma=inputs["gamma"]
    )
    found = ours(inputs, dy, ds)
    exact = plain(inputs, dy, ds, torch.float64)
    baseline = plain(inputs, dy, ds, inputs["x"].dtype)
    assert found.keys() == exact.keys()
    for name, value in found.items():
        source = inputs.get(name[1:], inputs["x"]) if name.startswith("d") else inputs["x"]
        assert value.dtype == source.dtype, name
        # A parameter in fp32 has a gradient that is as good as the rows are.
        assert_close(name, value.to(inputs["x"].dtype), baseline[name], exact[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [5, 16, 33, 64, 100, 257, 768])
def test_widths(level, columns, dtype):
    check(*draw((3, 7, columns), dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("branch, gamma, affine", [(False, False, True), (False, False, False), (True, False, True)])
def test_parts_that_are_not_there(level, branch, gamma, affine, dtype):
    check(*draw((4, 9, 48), dtype, branch, gamma, affine))


@pytest.mark.parametrize("shape", [(96,), (5, 96), (2, 3, 4, 96), (300, 40)])
def test_any_number_of_dimensions_and_rows(level, shape):
    check(*draw(shape, torch.float32))


def test_parameters_in_fp32_of_bf16_rows(level):
    check(*draw((5, 11, 80), torch.bfloat16, parameters=torch.float32))


@pytest.mark.parametrize("weights, biases", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_the_gradient_of_a_bias_is_not_rounded_like_the_weights(level, weights, biases):
    x, weight, bias = torch.randn(9, 33).bfloat16(), torch.randn(33).to(weights), torch.randn(33).to(biases)
    dy = torch.rand(9, 33).bfloat16()
    _, y = add_layer_norm(x, None, None, weight.requires_grad_(), bias.requires_grad_(), EPS, "cpu")
    y.backward(dy)
    assert (weight.grad.dtype, bias.grad.dtype) == (weights, biases)
    assert error(bias.grad, dy.double().sum(0)) < (1e-6 if biases == torch.float32 else 1e-2)


def test_a_mean_far_from_zero(level):
    check(*draw((4, 8, 192), torch.float32, offset=100.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(level, dtype):
    inputs, dy, ds = draw((3, 6, 40), dtype)
    wide = torch.randn(3, 9, 80).to(dtype)
    inputs["x"] = wide[:, 2:8, 7:47]
    inputs["branch"] = torch.randn(6, 3, 40).to(dtype).transpose(0, 1)
    check(inputs, dy.transpose(0, 1).contiguous().transpose(0, 1), ds[..., :1].expand(3, 6, 40))
    inputs["branch"] = torch.randn(3, 40, 6).to(dtype).transpose(1, 2)
    check(inputs, dy, torch.randn(40).to(dtype).expand(3, 6, 40))


def test_sums_do_not_depend_on_the_number_of_threads(level):
    inputs, dy, ds = draw((5, 211, 24), torch.float32)
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(ours(inputs, dy, ds))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(other[name], t) for name, t in results[0].items())


def test_what_is_not_asked_for():
    inputs, dy, _ = draw((2, 3, 16), torch.float32, branch=False)
    _, s, mean, rstd = layer_norm.forward(inputs["x"], inputs["weight"], inputs["bias"], EPS)
    assert s is inputs["x"]
    arguments = (dy, s, inputs["weight"], mean, rstd)
    assert layer_norm.backward(*arguments, needs_x=False) == (None,) * 4
    dx, dbranch, dbias, dweight = layer_norm.backward(*arguments, needs_x=False, needs_bias=True)
    assert dx is dbranch is dweight is None and torch.allclose(dbias, dy.sum((0, 1)), atol=1e-5)


def test_no_rows(level):
    inputs, dy, ds = draw((0, 5, 16), torch.float32)
    found = ours(inputs, dy, ds)
    assert found["y"].shape == (0, 5, 16) and not found["dweight"].any() and not found["dbias"].any()


def test_nan_and_infinity_stay(level):
    x = torch.randn(3, 40)
    x[0, 7], x[1, 3] = float("nan"), float("inf")
    y, *_ = layer_norm.forward(x, None, None, EPS)
    assert y[0].isnan().all() and not y[1].isfinite().all() and y[2].isfinite().all()


def test_what_it_refuses():
    x = torch.randn(2, 3, 8)
    assert layer_norm.reasons(x.half(), None, None, EPS) == ["torch.float16 is neither float32 nor bfloat16"]
    assert "the branch is (2, 3, 8) in torch.bfloat16" in layer_norm.reasons(x, None, None, EPS, branch=x.bfloat16())[0]
    assert "weight is (7,)" in layer_norm.reasons(x, torch.ones(7), None, EPS)[0]
    assert layer_norm.reasons(x[..., :0], None, None, EPS) == ["there are no rows of one or more columns"]
    assert not layer_norm.reasons(x, None, None, EPS)


def test_chosen_by_name():
    inputs, dy, _ = draw((2, 5, 32), torch.float32)
    results = []
    for backend in ("cpu", "reference"):
        leaves = {name: t.clone().requires_grad_(name != "gamma") for name, t in inputs.items()}
        s, y = add_layer_norm(*(leaves[n] for n in ("x", "branch", "gamma", "weight", "bias")), EPS, backend)
        (y * dy + s * s).sum().backward()
        results.append([s.detach(), y.detach(), *(t.grad for name, t in leaves.items() if name != "gamma")])
    assert all(error(a, b) <= 1e-5 for a, b in zip(*results, strict=True))


def test_a_wrong_result_would_be_seen():
    inputs, dy, ds = draw((3, 5, 32), torch.float32)
    exact = plain(inputs, dy, ds, torch.float64)
    baseline = plain(inputs, dy, ds, torch.float32)
    with pytest.raises(AssertionError, match="dx"):
        assert_close("dx", exact["dx"].float() * (1 + 1e-5), baseline["dx"], exact["dx"])
