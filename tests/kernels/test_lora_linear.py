from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.close import assert_close, error
from tests.thinned import paired

pytest.importorskip("triton")

from fastpeft.kernels import lora_linear
from fastpeft.kernels._launch import recording

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VARIANTS = lora_linear.VARIANTS

# rows, inner, out, terms (start, stop, rank), has a bias, factors are fp32 masters.
CASES = {
    "one row, rank 1": (1, 40, 48, [(0, 48, 1)], True, False),
    "q and v of a fused qkv": (65, 72, 144, [(0, 48, 8), (96, 144, 8)], True, True),
    "v before q, ranks differ": (17, 100, 192, [(128, 192, 16), (0, 64, 3)], False, True),
    "A shared by the whole qkv": (130, 40, 144, [(0, 144, 16)], True, True),
    "q, k and v, ranks differ": (65, 100, 288, [(0, 96, 1), (96, 192, 64), (192, 288, 3)], True, False),
    "four terms with columns between": (
        33,
        48,
        160,
        [(0, 32, 3), (48, 64, 8), (64, 112, 1), (128, 160, 16)],
        False,
        True,
    ),
    "wide rank, odd output": (17, 72, 100, [(0, 100, 64)], True, True),
    "the last columns, odd output": (65, 72, 107, [(64, 107, 8)], True, False),
    "tiles without a term before and behind": (130, 64, 384, [(128, 256, 8)], True, True),
}


def problem(case: str, dtype: torch.dtype, spread: float = 0.3) -> tuple:
    rows, inner, out, places, has_bias, masters = CASES[case]
    factor = torch.float32 if masters else dtype
    x = torch.randn(rows, inner, device=DEVICE).to(dtype)
    weight = (torch.randn(out, inner, device=DEVICE) / inner**0.5).to(dtype)
    bias = torch.randn(out, device=DEVICE).to(dtype) if has_bias else None
    terms = []
    for index, (start, stop, rank) in enumerate(places):
        a = (torch.randn(rank, inner, device=DEVICE) / inner**0.5).to(factor)
        b = (torch.randn(stop - start, rank, device=DEVICE) * spread).to(factor)
        terms.append((a, b, 0.75 + index, start, stop))
    dy = torch.randn(rows, out, device=DEVICE).to(dtype)
    return x, weight, bias, terms, dy


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, terms: list, dy: Tensor, dtype: torch.dtype) -> tuple:
    """y, dx and the factors' gradients, W and B A called separately, in one precision."""
    x, weight, dy = x.to(dtype).detach().requires_grad_(), weight.to(dtype), dy.to(dtype)
    factors = [tuple(factor.to(dtype).detach().requires_grad_() for factor in term[:2]) for term in terms]
    y = F.linear(x, weight, None if bias is None else bias.to(dtype))
    for (a, b), (_, _, scale, start, stop) in zip(factors, terms, strict=True):
        y = y + F.pad(scale * F.linear(F.linear(x, a), b), (start, y.shape[1] - stop))
    dx, *gradients = torch.autograd.grad(y, [x, *(factor for pair in factors for factor in pair)], dy)
    return y.detach(), dx, list(zip(gradients[::2], gradients[1::2], strict=True))


def check(x: Tensor, weight: Tensor, bias: Tensor | None, terms: list, dy: Tensor, variant: str) -> None:
    """Output, h and every gradient against plain PyTorch."""
    y, h = lora_linear.forward(x, weight, bias, terms, variant=variant)
    dx, gradients = lora_linear.backward(dy, x, weight, terms, h, variant=variant)
    # A factor is rounded to x's type wherever it meets x, so the exact result is that of the rounded factor.
    rounded = [(a.to(x.dtype), b.to(x.dtype), *rest) for a, b, *rest in terms]
    base_y, base_dx, base_gradients = plain(x, weight, bias, rounded, dy, x.dtype)
    exact_y, exact_dx, exact_gradients = plain(x, weight, bias, rounded, dy, torch.float64)
    assert y.dtype == h.dtype == dx.dtype == x.dtype
    assert_close("y", y, base_y, exact_y)
    assert_close("dx", dx, base_dx, exact_dx)
    column = 0
    for index, (a, b, *_) in enumerate(terms):
        own = h[:, column : column + a.shape[0]]
        a16 = rounded[index][0]
        assert_close(f"h{index}", own, F.linear(x, a16), F.linear(x.double(), a16.double()))
        column += a.shape[0]
        for name, factor, *values in zip(
            ("dA", "dB"), (a, b), gradients[index], base_gradients[index], exact_gradients[index], strict=True
        ):
            value, base, exact = values
            assert value.dtype == factor.dtype
            # The baseline's error is that of its type, also where the gradient of a master is fp32.
            assert_close(f"{name}{index}", value.to(x.dtype), base, exact)


@pytest.mark.parametrize(
    "case, kind",
    paired([*CASES], [(variant, dtype) for variant in VARIANTS for dtype in (torch.float32, torch.float16)]),
)
def test_forward_and_gradients(case, kind, poisoned_memory):
    variant, dtype = kind
    check(*problem(case, dtype), variant)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", ["q and v of a fused qkv", "A shared by the whole qkv", "wide rank, odd output"])
def test_the_terms_alone(case, variant, dtype, poisoned_memory):
    """Beside a frozen weight of zeros nothing covers an error of a small term."""
    x, weight, _, terms, dy = problem(case, dtype, spread=1e-3)
    check(x, torch.zeros_like(weight), None, terms, dy, variant)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("spread", [0.3, 0.01])
def test_the_contribution_beside_a_frozen_product(variant, dtype, spread, poisoned_memory):
    """Adapted minus frozen is no further off than in plain PyTorch, both for y and for dx."""
    x, weight, bias, terms, dy = problem("q and v of a fused qkv", dtype, spread)
    terms = [(a.to(dtype), b.to(dtype), *rest) for a, b, *rest in terms]
    y, h = lora_linear.forward(x, weight, bias, terms, variant=variant)
    dx, _ = lora_linear.backward(dy, x, weight, terms, h, variant=variant)
    frozen = F.linear(x.double(), weight.double(), bias.double()), dy.double() @ weight.double()
    exact = plain(x, weight, bias, terms, dy, torch.float64)
    base = plain(x, weight, bias, terms, dy, dtype)
    compared = zip(("y", "dx"), (y, dx), base[:2], exact[:2], frozen, strict=True)
    for name, value, base_value, exact_value, without in compared:
        found = error(value.double() - without, exact_value - without)
        baseline = error(base_value.double() - without, exact_value - without)
        assert found <= 1.25 * baseline, f"{name}: contribution off by {found:.2e}, in plain PyTorch by {baseline:.2e}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_strided_inputs(variant, poisoned_memory):
    """Rows of x, of the weight and of dy lie in wider tensors, and the weight is a part of a fused one."""
    x, weight, bias, terms, dy = problem("q and v of a fused qkv", torch.float16)
    wide_x = torch.full((x.shape[0], x.shape[1] + 24), torch.nan, dtype=x.dtype, device=DEVICE)
    wide_x[:, 8 : 8 + x.shape[1]] = x
    wide_weight = torch.full((3 * weight.shape[0], weight.shape[1] + 5), torch.nan, dtype=x.dtype, device=DEVICE)
    wide_weight[weight.shape[0] : 2 * weight.shape[0], : weight.shape[1]] = weight
    wide_dy = torch.full((dy.shape[0], dy.shape[1] + 3), torch.nan, dtype=x.dtype, device=DEVICE)
    wide_dy[:, 3:] = dy
    check(
        wide_x[:, 8 : 8 + x.shape[1]],
        wide_weight[weight.shape[0] : 2 * weight.shape[0], : weight.shape[1]],
        bias,
        terms,
        wide_dy[:, 3:],
        variant,
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_gradient_of_any_layout(variant, layout):
    """What autograd hands over may be expanded or transposed."""
    x, weight, bias, terms, dy = problem("q and v of a fused qkv", torch.float32)
    dy = dy[:1, :1].expand(dy.shape) if layout == "expanded" else dy.t().contiguous().t()
    check(x, weight, bias, terms, dy, variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("needs_factors", [True, False])
@pytest.mark.parametrize("needs_x", [True, False])
def test_only_what_is_asked_for(variant, needs_x, needs_factors, poisoned_memory):
    x, weight, bias, terms, dy = problem("q and v of a fused qkv", torch.float16)
    _, h = lora_linear.forward(x, weight, bias, terms, variant=variant)
    full = lora_linear.backward(dy, x, weight, terms, h, variant=variant)
    dx, gradients = lora_linear.backward(
        dy, x, weight, terms, h, needs_x=needs_x, needs_factors=needs_factors, variant=variant
    )
    assert (dx is not None) == needs_x and (gradients is not None) == needs_factors
    if needs_x:
        assert dx.equal(full[0])
    if needs_factors:
        for value, expected in zip(gradients, full[1], strict=True):
            assert_close("dA", value[0], expected[0], expected[0].double())
            assert_close("dB", value[1], expected[1], expected[1].double())


def launches(variant: str, **needs: bool) -> dict[str, dict]:
    """Kernels of a backward pass, by name, with their arguments."""
    x, weight, _, terms, dy = (
        torch.empty(65, 72, device="meta"),
        torch.empty(144, 72, device="meta"),
        None,
        [(torch.empty(8, 72, device="meta"), torch.empty(48, 8, device="meta"), 1.0, 0, 48)],
        torch.empty(65, 144, device="meta"),
    )
    with recording(90) as found:
        lora_linear.backward(dy, x, weight, terms, torch.empty(65, 8, device="meta"), variant=variant, **needs)
    return {launch.name: launch.arguments for launch in found}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_not_asked_for_is_not_launched(variant):
    of_x = f"lora_linear_backward_{variant}"
    only_x = launches(variant, needs_factors=False)
    assert set(only_x) == {of_x} and only_x[of_x]["g_ptr"] is None
    only_factors = launches(variant, needs_x=False)
    assert set(only_factors) == {"lora_linear_backward_beside", "lora_linear_factors"}
    assert only_factors["lora_linear_backward_beside"]["dx_ptr"] is None
    assert launches(variant, needs_x=False, needs_factors=False) == {}
    assert set(launches(variant)) == {of_x, "lora_linear_factors"}


@pytest.mark.parametrize("variant, dtype", paired(VARIANTS, [torch.float32, torch.float16]))
def test_the_same_every_time(variant, dtype, poisoned_memory):
    x, weight, bias, terms, dy = problem("q, k and v, ranks differ", dtype)
    runs = []
    for _ in range(2):
        y, h = lora_linear.forward(x, weight, bias, terms, variant=variant)
        dx, gradients = lora_linear.backward(dy, x, weight, terms, h, variant=variant)
        runs.append([y, h, dx, *(gradient for pair in gradients for gradient in pair)])
    assert all(one.equal(other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("processors", [1, 64])
def test_rows_split_among_any_number_of_programs(processors, monkeypatch, poisoned_memory):
    monkeypatch.setattr(lora_linear, "processors_of", lambda device: processors)
    for variant in VARIANTS:
        check(*problem("tiles without a term before and behind", torch.float32), variant)


def test_columns_without_a_term_are_the_frozen_product():
    x, weight, bias, terms, _ = problem("q and v of a fused qkv", torch.float16)
    y, _ = lora_linear.forward(x, weight, bias, terms, variant="beside")
    assert y[:, 48:96].equal(F.linear(x, weight, bias)[:, 48:96])


@pytest.mark.parametrize("variant", VARIANTS)
def test_arguments_are_left_as_they_are(variant):
    x, weight, bias, terms, dy = problem("q and v of a fused qkv", torch.float16)
    given = [x, weight, bias, dy, *(factor for term in terms for factor in term[:2])]
    before = [tensor.clone() for tensor in given]
    _, h = lora_linear.forward(x, weight, bias, terms, variant=variant)
    kept = h.clone()
    lora_linear.backward(dy, x, weight, terms, h, variant=variant)
    assert all(one.equal(other) for one, other in zip([*given, h], [*before, kept], strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_rows(variant, poisoned_memory):
    x, weight, bias, terms, dy = problem("q and v of a fused qkv", torch.float32)
    y, h = lora_linear.forward(x[:0], weight, bias, terms, variant=variant)
    dx, gradients = lora_linear.backward(dy[:0], x[:0], weight, terms, h, variant=variant)
    assert y.shape == (0, 144) and h.shape == (0, 16) and dx.shape == (0, 72)
    assert all(not gradient.any() for pair in gradients for gradient in pair)


def test_the_comparison_sees_a_wrong_term():
    """A term that is 1 % too large, or that lies in the wrong columns, does not pass."""
    x, weight, bias, terms, dy = problem("q and v of a fused qkv", torch.float16)
    terms = [(a.half(), b.half(), *rest) for a, b, *rest in terms]
    base, exact = (plain(x, weight, bias, terms, dy, dtype) for dtype in (torch.float16, torch.float64))
    larger = [(a, b, scale * 1.01, start, stop) for a, b, scale, start, stop in terms]
    moved = [(a, b, scale, start - start // 2, stop - start // 2) for a, b, scale, start, stop in terms]
    for wrong in (larger, moved):
        y, h = lora_linear.forward(x, weight, bias, wrong)
        dx, gradients = lora_linear.backward(dy, x, weight, wrong, h)
        for value, base_value, exact_value in (
            (y, base[0], exact[0]),
            (dx, base[1], exact[1]),
            (gradients[1][1], base[2][1][1], exact[2][1][1]),
        ):
            with pytest.raises(AssertionError):
                assert_close("wrong", value, base_value, exact_value)


def refused(**changes) -> str:
    x, weight, bias, terms, _ = problem("q and v of a fused qkv", torch.float16)
    arguments = {"x": x, "weight": weight, "bias": bias, "terms": terms} | changes
    found = lora_linear.reasons(**arguments)
    assert found
    with pytest.raises(ValueError, match="lora_linear cannot run"):
        lora_linear.forward(*arguments.values())
    return "; ".join(found)


def term(start: int = 0, stop: int = 48, rank: int = 8, dtype: torch.dtype = torch.float16, inner: int = 72) -> tuple:
    return torch.zeros(rank, inner, dtype=dtype), torch.zeros(stop - start, rank, dtype=dtype), 1.0, start, stop


def test_what_cannot_run_is_refused():
    half = torch.zeros(65, 72, dtype=torch.float16)
    assert "not one of float16" in refused(x=half.double())
    assert "the weight is" in refused(x=half.float())
    assert "not (M, K) and (N, K)" in refused(x=half[None])
    assert "side by side" in refused(x=torch.zeros(72, 65, dtype=torch.float16).t())
    assert "the bias" in refused(bias=torch.zeros(3))
    assert "0 low-rank terms" in refused(terms=[])
    assert "5 low-rank terms" in refused(terms=[term(16 * i, 16 * i + 16) for i in range(5)])
    assert "rank 65" in refused(terms=[term(rank=65)])
    assert "multiple of 16" in refused(terms=[term(8, 56)])
    assert "overlap" in refused(terms=[term(0, 48), term(32, 96)])
    assert "do not fit" in refused(terms=[term(96, 160)])
    assert "do not fit" in refused(terms=[term(inner=71)])
    assert "different types" in refused(terms=[term(0, 48), term(96, 144, dtype=torch.float32)])
    assert "expected torch.float16 or float32" in refused(terms=[term(dtype=torch.float64)])
    a, b, *rest = term()
    assert "not contiguous" in refused(terms=[(a, b.t().contiguous().t(), *rest)])
    assert "dropout" in refused(terms=[(*term(), torch.nn.Dropout(0.1), None)])


def test_a_chip_that_is_too_old_is_refused():
    meta = {"dtype": torch.bfloat16, "device": "meta"}
    terms = [(torch.empty(8, 64, **meta), torch.empty(64, 8, **meta), 1.0, 0, 64)]
    for capability, reason in ((75, "bfloat16 needs"), (70, "compute capability 7.5")):
        with recording(capability):
            found = lora_linear.reasons(torch.empty(3, 64, **meta), torch.empty(64, 64, **meta), None, terms)
        assert len(found) == 1 and reason in found[0]
    with recording(80):
        assert not lora_linear.reasons(torch.empty(3, 64, **meta), torch.empty(64, 64, **meta), None, terms)


def test_what_can_run_is_not_refused():
    for case in CASES:
        x, weight, bias, terms, _ = problem(case, torch.float16)
        assert not lora_linear.reasons(x, weight, bias, terms)
        assert not lora_linear.reasons(x, weight, bias, [(*one, None, None) for one in terms])


def test_an_unknown_variant_is_an_error():
    x, weight, bias, terms, dy = problem("one row, rank 1", torch.float32)
    with pytest.raises(ValueError, match="expected one of fused, beside"):
        lora_linear.forward(x, weight, bias, terms, variant="best")
    with pytest.raises(ValueError, match="expected one of fused, beside"):
        lora_linear.backward(dy, x, weight, terms, x[:, :1], variant="best")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tokens", [197, 257, 577])
def test_a_transformers_shapes(tokens, variant, dtype, poisoned_memory):
    x = torch.randn(2 * tokens, 192, device=DEVICE).to(dtype)
    weight = (torch.randn(576, 192, device=DEVICE) / 192**0.5).to(dtype)
    terms = [
        (
            torch.randn(8, 192, device=DEVICE) / 192**0.5,
            torch.randn(192, 8, device=DEVICE) * 0.1,
            2.0,
            start,
            start + 192,
        )
        for start in (0, 384)
    ]
    dy = torch.randn(2 * tokens, 576, device=DEVICE).to(dtype)
    check(x, weight, torch.randn(576, device=DEVICE).to(dtype), terms, dy, variant)
