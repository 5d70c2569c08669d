from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.close import assert_close, error
from tests.thinned import thinned

pytest.importorskip("triton")

from fastpeft.kernels import mlp
from fastpeft.kernels._activation import CODES
from fastpeft.kernels._launch import recording

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VARIANTS = mlp.VARIANTS
ACTIVATIONS = {
    "identity": lambda z: z * 1,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "silu": F.silu,
}
# rows, inner, out, bias: None, of x's type or fp32.
SHAPES = [(1, 40, 48, "own"), (17, 72, 100, None), (65, 100, 144, "fp32"), (130, 64, 96, "own")]


# Eight bits are not offered for fp32.
KEPT = [(keep, dtype) for dtype in (torch.float32, torch.float16) for keep in mlp.KEEP]
KEPT.remove(("derivative8", torch.float32))
EVERY = thinned(itertools.product(SHAPES, ACTIVATIONS, VARIANTS, KEPT), 7)


def problem(rows: int, inner: int, out: int, bias: str | None, dtype: torch.dtype) -> tuple:
    x = torch.randn(rows, inner, device=DEVICE).to(dtype)
    weight = (torch.randn(out, inner, device=DEVICE) * 1.5 / inner**0.5).to(dtype)
    vector = None if bias is None else torch.randn(out, device=DEVICE).to(dtype if bias == "own" else torch.float32)
    return x, weight, vector


def slope(z: Tensor, activation: str) -> Tensor:
    """act'(z) by autograd, in z's precision."""
    z = z.detach().requires_grad_()
    return torch.autograd.grad(ACTIVATIONS[activation](z).sum(), z)[0]


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    z = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return z, ACTIVATIONS[activation](z)


def test_every_activation_is_tested():
    assert set(ACTIVATIONS) == set(CODES) == set(mlp.DERIVATIVE_RANGES)


@pytest.mark.parametrize("shape, activation, variant, kind", EVERY)
def test_forward(shape, activation, variant, kind, poisoned_memory):
    keep, dtype = kind
    x, weight, bias = problem(*shape, dtype)
    a, kept = mlp.forward(x, weight, bias, activation, keep=keep, variant=variant)
    base_z, base_a = plain(x, weight, bias, activation, dtype)
    exact_z, exact_a = plain(x, weight, bias, activation, torch.float64)
    assert a.dtype == dtype
    assert_close("a", a, base_a, exact_a)
    if keep == "nothing":
        assert kept is None
    elif keep == "preactivation":
        assert kept.dtype == dtype
        assert_close("z", kept, base_z, exact_z)
    else:
        assert kept.dtype == torch.uint8
        lowest, step = mlp.DERIVATIVE_RANGES[activation][0], mlp.derivative_step(activation)
        # The derivative of a z that was rounded; where act' jumps, as relu's does, a z beside the jump may fall over.
        off = (kept.double() * step + lowest - slope(exact_z, activation)).abs()
        rounding = 2 * torch.finfo(dtype).eps * exact_z.abs().max()
        clear = exact_z.abs() > rounding
        assert (off <= step / 2 + 1.2 * rounding)[clear].all()


@pytest.mark.parametrize("shape, activation, variant, kind", EVERY)
def test_backward_input(shape, activation, variant, kind, poisoned_memory):
    (rows, out, hidden, _), (keep, dtype) = shape, kind
    dy = torch.randn(rows, out, device=DEVICE).to(dtype)
    weight = (torch.randn(out, hidden, device=DEVICE) / out**0.5).to(dtype)
    z = (torch.randn(rows, hidden, device=DEVICE) * 2).to(dtype)
    if keep == "derivative8":
        kept = torch.randint(0, 256, z.shape, dtype=torch.uint8, device=DEVICE)
        factor = kept.double() * mlp.derivative_step(activation) + mlp.DERIVATIVE_RANGES[activation][0]
    else:
        kept, factor = z, slope(z.double(), activation)
    dz = mlp.backward_input(dy, weight, kept, activation, keep=keep, variant=variant)
    base = (dy @ weight) * (factor.to(dtype) if keep == "derivative8" else slope(z, activation))
    assert dz.dtype == dtype
    assert_close("dz", dz, base, (dy.double() @ weight.double()) * factor)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivative_ranges(activation):
    """The range holds every derivative and no more."""
    lowest, highest = mlp.DERIVATIVE_RANGES[activation]
    found = slope(torch.linspace(-30, 30, 2_000_001, dtype=torch.float64), activation)
    assert lowest <= found.min() and found.max() <= highest
    if activation not in ("identity", "relu"):
        assert found.min() - lowest < 1e-6 and highest - found.max() < 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_eight_bits_are_off_by_half_a_step(activation, variant, poisoned_memory):
    """An identity for a weight, so that z is x exactly; every derivative, and those at the ends of the range."""
    x = torch.cat((torch.linspace(-9, 9, 33 * 16 - 4), torch.tensor([-1.4142, 1.4142, -2.3994, 2.3994])))
    x = x.to(torch.float16).view(33, 16).to(DEVICE)
    eye = torch.eye(16, dtype=torch.float16, device=DEVICE)
    _, kept = mlp.forward(x, eye, None, activation, keep="derivative8", variant=variant)
    lowest, step = mlp.DERIVATIVE_RANGES[activation][0], mlp.derivative_step(activation)
    off = (kept.double() * step + lowest - slope(x.double(), activation)).abs().max()
    # The kernel's own arithmetic is fp32.
    assert off <= step / 2 + 2e-6
    if activation in ("identity", "relu"):
        assert off < 1e-6
    else:
        assert off > step / 4


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("keep", mlp.KEEP)
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_both_halves_of_an_mlp(activation, keep, variant, poisoned_memory):
    """The gradient of the input through both layers, from what the forward pass kept."""
    x, weight, bias = problem(65, 40, 96, "own", torch.float16)
    second = (torch.randn(40, 96, device=DEVICE) / 96**0.5).half()
    dy = torch.randn(65, 40, device=DEVICE).half()
    _, kept = mlp.forward(x, weight, bias, activation, keep=keep, variant=variant)
    if keep == "nothing":
        kept = F.linear(x, weight, bias)
    dz = mlp.backward_input(dy, second, kept, activation, keep=keep, variant=variant)
    results = []
    for dtype in (torch.float16, torch.float64):
        z = plain(x, weight, bias, activation, dtype)[0].requires_grad_()
        results.append(torch.autograd.grad(F.linear(ACTIVATIONS[activation](z), second.to(dtype)), z, dy.to(dtype))[0])
    base, exact = results
    if keep != "derivative8":
        assert_close("dz", dz, base, exact)
        return
    # Uniform rounding of the derivative is off by a step / sqrt(12) in the mean square.
    rounding = mlp.derivative_step(activation) / 12**0.5 * (dy.double() @ second.double()).norm() / exact.norm()
    assert error(dz, exact) <= 2 * error(base, exact) + 1.1 * rounding


@pytest.mark.parametrize("variant", VARIANTS)
def test_strided_inputs(variant, poisoned_memory):
    x, weight, bias = problem(33, 72, 48, "own", torch.float16)
    wide_x = torch.full((33, 90), torch.nan, dtype=x.dtype, device=DEVICE)
    wide_x[:, 7:79] = x
    wide_weight = torch.full((96, 80), torch.nan, dtype=x.dtype, device=DEVICE)
    wide_weight[48:, :72] = weight
    a, z = mlp.forward(wide_x[:, 7:79], wide_weight[48:, :72], bias, "gelu", variant=variant)
    expected, expected_z = mlp.forward(x, weight, bias, "gelu", variant=variant)
    assert_close("a", a, expected, expected.double())
    assert_close("z", z, expected_z, expected_z.double())
    for dy in (wide_x[:, 7:55], x[:1, :1].expand(33, 48), torch.randn(48, 33, device=DEVICE).half().t()):
        kept = torch.randn(33, 72, device=DEVICE).half()
        dz = mlp.backward_input(dy, wide_weight[48:, :72], kept, "gelu", keep="preactivation", variant=variant)
        plain_dz = mlp.backward_input(dy.clone(), weight, kept, "gelu", keep="preactivation", variant=variant)
        assert_close("dz", dz, plain_dz, plain_dz.double())


@pytest.mark.parametrize("keep", mlp.KEEP)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_every_time_and_arguments_as_they_were(variant, keep, poisoned_memory):
    x, weight, bias = problem(65, 72, 144, "fp32", torch.float16)
    second, dy = torch.randn(72, 144, device=DEVICE).half(), torch.randn(65, 72, device=DEVICE).half()
    given = [x, weight, bias, second, dy]
    before = [tensor.clone() for tensor in given]
    runs = []
    for _ in range(2):
        a, kept = mlp.forward(x, weight, bias, "gelu", keep=keep, variant=variant)
        z = a if kept is None else kept
        saved = z.clone()
        dz = mlp.backward_input(dy, second, z, "gelu", keep=keep, variant=variant)
        assert z.equal(saved)
        runs.append([a, z, dz])
    assert all(one.equal(other) for one, other in zip(*runs, strict=True))
    assert all(one.equal(other) for one, other in zip(given, before, strict=True))


@pytest.mark.parametrize("keep", mlp.KEEP)
@pytest.mark.parametrize("variant", VARIANTS)
def test_no_rows(variant, keep):
    x, weight, bias = problem(1, 40, 48, "own", torch.float16)
    a, kept = mlp.forward(x[:0], weight, bias, "gelu", keep=keep, variant=variant)
    assert a.shape == (0, 48) and (kept is None or kept.shape == (0, 48))
    dz = mlp.backward_input(
        x[:0], weight.t().contiguous(), a if kept is None else kept, "gelu", keep=keep, variant=variant
    )
    assert dz.shape == (0, 48)


def test_what_is_kept_costs_no_second_tensor():
    """Beside: z is the product's own output, and a takes its place where z is not kept."""
    x, weight, bias = (torch.empty(shape, dtype=torch.float16, device="meta") for shape in ((65, 40), (96, 40), (96,)))
    for keep, separate, stores in (
        ("preactivation", True, False),
        ("derivative8", False, True),
        ("nothing", False, False),
    ):
        with recording(90) as found:
            mlp.forward(x, weight, bias, "gelu", keep=keep, variant="beside")
        (launch,) = found
        assert (launch.arguments["z_ptr"] is not launch.arguments["a_ptr"]) == separate
        assert (launch.arguments["kept_ptr"] is not None) == stores
        assert launch.arguments["bias_ptr"] is None


def test_the_comparison_sees_another_activation():
    x, weight, bias = problem(65, 72, 144, "own", torch.float16)
    base, exact = (plain(x, weight, bias, "gelu", dtype)[1] for dtype in (torch.float16, torch.float64))
    a, _ = mlp.forward(x, weight, bias, "quick_gelu")
    with pytest.raises(AssertionError):
        assert_close("a", a, base, exact)
    a, _ = mlp.forward(x, weight, None, "gelu")
    with pytest.raises(AssertionError):
        assert_close("a", a, base, exact)


def test_what_cannot_run_is_refused():
    def refused(*arguments, **options) -> str:
        found = mlp.reasons(*arguments, **options)
        assert found
        with pytest.raises(ValueError, match="mlp cannot run"):
            mlp.forward(*arguments, **options)
        return "; ".join(found)

    x, weight, bias = problem(3, 40, 48, "own", torch.float16)
    assert "not one of float16" in refused(x.double(), weight, bias, "gelu")
    assert "the weight is" in refused(x.float(), weight, bias, "gelu")
    assert "'elu' is not one of" in refused(x, weight, bias, "elu")
    assert "'all' is not one of" in refused(x, weight, bias, "gelu", keep="all")
    assert "too few for float32" in refused(x.float(), weight.float(), None, "gelu", keep="derivative8")
    assert "not (M, K) and (N, K)" in refused(x[:, :39], weight, bias, "gelu")
    assert "the bias (3,)" in refused(x, weight, bias[:3], "gelu")
    assert "the bias is" in refused(x, weight, bias.double(), "gelu")
    assert "side by side" in refused(x, weight.t().contiguous().t(), bias, "gelu")
    assert not mlp.reasons(x, weight, bias, "gelu", keep="derivative8")


def test_what_backward_cannot_take_is_refused():
    def refused(*arguments, keep="preactivation") -> str:
        found = mlp.backward_reasons(*arguments, keep=keep)
        assert found
        with pytest.raises(ValueError, match="mlp cannot run"):
            mlp.backward_input(*arguments, keep=keep)
        return "; ".join(found)

    dy, weight, kept = (torch.zeros(shape, dtype=torch.float16) for shape in ((3, 48), (48, 40), (3, 40)))
    assert "not (M, N) and (N, K)" in refused(dy[:, :47], weight, kept, "gelu")
    assert "contiguous" in refused(dy, weight, kept.t().contiguous().t(), "gelu")
    assert "what was kept (3, 39)" in refused(dy, weight, kept[:, :39], "gelu")
    assert "expected torch.float16" in refused(dy, weight, kept.byte(), "gelu")
    assert "expected torch.uint8" in refused(dy, weight, kept, "gelu", keep="derivative8")
    assert "too few" in refused(dy.float(), weight.float(), kept.byte(), "gelu", keep="derivative8")
    assert not mlp.backward_reasons(dy, weight, kept, "gelu", keep="nothing")


def test_an_unknown_variant_is_an_error():
    x, weight, bias = problem(3, 40, 48, "own", torch.float16)
    with pytest.raises(ValueError, match="expected one of fused, beside"):
        mlp.forward(x, weight, bias, "gelu", variant="best")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tokens", [197, 257, 577])
def test_a_transformers_shapes(tokens, variant, dtype, poisoned_memory):
    x, weight, bias = problem(2 * tokens, 192, 768, "own", dtype)
    second = (torch.randn(192, 768, device=DEVICE) / 768**0.5).to(dtype)
    dy = torch.randn(2 * tokens, 192, device=DEVICE).to(dtype)
    a, z = mlp.forward(x, weight, bias, "gelu", variant=variant)
    base, exact = (plain(x, weight, bias, "gelu", kind) for kind in (dtype, torch.float64))
    assert_close("a", a, base[1], exact[1])
    dz = mlp.backward_input(dy, second, z, "gelu", keep="preactivation", variant=variant)
    assert_close(
        "dz", dz, (dy @ second) * slope(base[0], "gelu"), (dy.double() @ second.double()) * slope(exact[0], "gelu")
    )
