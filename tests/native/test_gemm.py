"""Products on the matrix unit against float64: every prologue and epilogue, both layouts, ragged sizes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from fastpeft.native import blocked
from fastpeft.native.factors import factors
from fastpeft.native.gemm import gemm, pack
from fastpeft.native.layer_norm import layer_norm_backward
from fastpeft.ops.activation import DERIVATIVES, FUNCTIONS
from fastpeft.ops.mlp import DERIVATIVE_LOW, DERIVATIVE_STEP
from tests.kernels.close import assert_close, error
from tests.native.amx import BF16, as_rows, both_layouts, needs_amx, outputs

pytestmark = needs_amx

# Rows; depth, columns. Depths to 1024 and beyond are computed in another order; slabs end within these rows. To 256
# rows panels are dealt out to threads, beyond these rows are.
ROWS = (1, 31, 32, 33, 77, 289)
SIZES = ((32, 32), (96, 64), (768, 96), (1024, 32), (1056, 64), (3072, 32))
EPSILON = 1e-6


def draw(rows, depth, columns):
    x = torch.randn(rows, depth).to(BF16)
    w = (torch.randn(columns, depth) / depth**0.5).to(BF16)
    return x, w, torch.randn(columns)


def reference(x, w, bias):
    """y = x w^T + b, in float64 and as torch does it in bf16."""
    exact = x.double() @ w.double().T + bias.double()
    return exact, F.linear(x, w, bias.to(BF16))


@pytest.mark.parametrize("depth, columns", SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_product_with_bias(rows, depth, columns):
    x, w, bias = draw(rows, depth, columns)
    exact, plain = reference(x, w, bias)
    packed = pack(w)
    for (name, a), (to, c) in itertools.product(both_layouts(x).items(), outputs(rows, columns).items()):
        gemm(a, packed, c, rows, bias)
        assert_close(f"{name} to {to}", as_rows(c, rows), plain, exact)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows, depth, columns", [(3152, 768, 128), (1500, 3072, 96), (2000, 1280, 64), (999, 4096, 64)]
)
def test_many_slabs(rows, depth, columns):
    x, w, bias = draw(rows, depth, columns)
    exact, plain = reference(x, w, bias)
    other = torch.randn(rows, columns).to(BF16)
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for name, a in both_layouts(x).items():
                for to, c in outputs(rows, columns).items():
                    gemm(a, pack(w), c, rows, bias)
                    assert_close(f"{name} to {to}", as_rows(c, rows), plain, exact)
                c = gemm(a, pack(w), torch.empty(rows, columns, dtype=BF16), rows, bias, other=other)
                assert_close(f"{name} sum", c, plain + other, exact + other.double())
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("rows", ROWS)
def test_residual(rows):
    x, w, bias = draw(rows, 96, 64)
    exact, plain = reference(x, w, bias)
    other = torch.randn(rows, 64).to(BF16)
    for (name, a), (to, o) in itertools.product(both_layouts(x).items(), both_layouts(other).items()):
        c = gemm(a, pack(w), outputs(rows, 64)[to], rows, bias, other=o)
        assert_close(f"{name} to {to}", as_rows(c, rows), plain + other, exact + other.double())


@pytest.mark.parametrize("rows", ROWS)
def test_two_residuals(rows):
    """As behind an adapter: what the branch gave, in blocks, and the stream."""
    x, w, bias = draw(rows, 64, 96)
    exact, plain = reference(x, w, bias)
    f, stream = torch.randn(rows, 96).to(BF16), torch.randn(rows, 96)
    for to, o in both_layouts(f).items():
        for wide in (stream, stream.to(BF16)):
            c = torch.empty_like(wide)
            gemm(both_layouts(x)["blocked"], pack(w), c, rows, bias, other=o, another=wide)
            # The product comes in bf16 whatever the stream: bf16's bound.
            assert_close(f"{to} {wide.dtype}", c.to(BF16), plain + f + wide, exact + f.double() + wide.double())
    c = gemm(x, pack(w), outputs(rows, 96)["blocked"], rows, bias, other=f, another=stream.to(BF16))
    assert_close(
        "blocked", as_rows(c, rows), plain + f + stream.to(BF16), exact + f.double() + stream.to(BF16).double()
    )


@pytest.mark.parametrize("scale, offset", [(1.0, 0.0), (30.0, 5.0), (1e-3, 0.0)])
def test_normalised_rows(scale, offset):
    rows, depth, columns = 45, 96, 64
    x, w, bias = draw(rows, depth, columns)
    x = (x.float() * scale + offset).to(BF16)
    normed = F.layer_norm(x.double(), (depth,), eps=EPSILON)
    exact = normed @ w.double().T + bias.double()
    plain = F.linear(F.layer_norm(x, (depth,), eps=EPSILON), w, bias.to(BF16))
    for name, a in both_layouts(x).items():
        statistics = torch.full((2, rows), float("nan"))
        c = gemm(a, pack(w), outputs(rows, columns)["blocked"], rows, bias, statistics=statistics, epsilon=EPSILON)
        assert_close(name, as_rows(c, rows), plain, exact)
        deviation = (x.double().var(1, correction=0) + EPSILON).sqrt()
        assert error(statistics[0], x.double().mean(1)) < 1e-5 or scale < 1
        assert error(statistics[1], 1 / deviation) < 1e-5


@pytest.mark.parametrize("rows", (1, 45))
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_activation_and_what_is_kept_of_it(activation, rows):
    x, w, bias = draw(rows, 96, 64)
    x = (x.float() * 3).to(BF16)
    z, plain = reference(x, w, bias)
    exact, slope = FUNCTIONS[activation](z), DERIVATIVES[activation](z)
    dy, _, _ = draw(rows, 32, 64)
    w2 = torch.randn(32, 64).to(BF16)
    back = dy.double() @ w2.double()
    for kept in (None, blocked.empty(rows, 64), blocked.empty(rows, 64, torch.uint8)):
        a = gemm(x, pack(w), outputs(rows, 64)["blocked"], rows, bias, activation=activation, kept=kept)
        assert_close("activation", as_rows(a, rows), FUNCTIONS[activation](plain), exact)
        if kept is None:
            continue
        eight = kept.dtype == torch.uint8
        value = as_rows(kept, rows).double()
        value = value * DERIVATIVE_STEP + DERIVATIVE_LOW if eight else value
        # ReLU's slope jumps where a sum is zero up to rounding: the two signs may then differ.
        sure = z.abs() > 1e-6
        assert ((value - slope).abs()[sure] <= (0.51 * DERIVATIVE_STEP if eight else 0.0045)).all()
        dz = gemm(dy, pack(w2.T), outputs(rows, 64)["blocked"], rows, kept=kept)
        assert error(as_rows(dz, rows), back * value) <= 3e-3


def test_activations_far_out():
    """No NaN, no denormal numbers that cost or count, and the right limits."""
    z = torch.tensor([-1e4, -100.0, -20.0, -13.5, -5.0, -0.0, 5.0, 20.0, 1e4], dtype=BF16)
    x = torch.zeros(1, 32, dtype=BF16)
    for activation, function in FUNCTIONS.items():
        bias = torch.zeros(32)
        bias[: len(z)] = z.float()
        kept = blocked.empty(1, 32)
        a = gemm(x, pack(torch.zeros(32, 32)), blocked.empty(1, 32), 1, bias, activation=activation, kept=kept)
        torch.testing.assert_close(
            as_rows(a, 1)[0, : len(z)].double(), function(bias.double())[: len(z)], rtol=5e-3, atol=1e-6, msg=activation
        )
        assert as_rows(kept, 1).isfinite().all()


@pytest.mark.parametrize("extra", (32, 64))
@pytest.mark.parametrize("depth", (96, 1056))
def test_low_rank_terms_as_steps_of_depth(depth, extra):
    rows, columns = 45, 64
    x, w, bias = draw(rows, depth, columns)
    down, up = torch.randn(extra, depth) / depth**0.5, torch.randn(columns, extra) / extra**0.5
    down_bias = torch.randn(extra)
    u = x.double() @ down.double().T + down_bias.double()
    exact = x.double() @ w.double().T + bias.double() + u @ up.double().T
    rounded = (F.linear(x, down.to(BF16), down_bias.to(BF16)), up.to(BF16))
    plain = F.linear(x, w, bias.to(BF16)) + F.linear(*rounded)
    for name, a in both_layouts(x).items():
        a2 = outputs(rows, extra)["blocked"]
        options = {"a2": a2, "extra": pack(up)}
        c = gemm(
            a, pack(w), outputs(rows, columns)["blocked"], rows, bias, down=pack(down), down_bias=down_bias, **options
        )
        assert_close(f"{name} down", as_rows(a2, rows), rounded[0], u)
        assert_close(name, as_rows(c, rows), plain, exact)
        # The same with what is there already.
        c = gemm(a, pack(w), outputs(rows, columns)["row-major"], rows, bias, **options)
        assert_close(f"{name} given", c, plain, exact)


def test_packing_folds_scales_and_fills_up():
    w, column, row = torch.randn(40, 50), torch.rand(50) + 0.5, torch.rand(40) + 0.5
    packed = pack(w.t().contiguous().t(), column, row)
    assert (packed.columns, packed.depth) == (64, 64)
    x = torch.zeros(3, 64)
    x[:, :50] = torch.randn(3, 50)
    x = x.to(BF16)
    c = gemm(x, packed, torch.empty(3, 64, dtype=BF16), 3)
    folded = row[:, None] * w * column
    assert_close("folded", c[:, :40], x[:, :50] @ folded.to(BF16).T, x[:, :50].double() @ folded.double().T)
    assert not c[:, 40:].any()


@pytest.mark.parametrize("rows", (1, 32, 77))
def test_gradients_of_factors(rows):
    left, right = torch.randn(rows, 64).to(BF16), torch.randn(rows, 96).to(BF16)
    exact = left.double().T @ right.double()
    plain = (left.float().T @ right.float()).to(BF16)
    statistics = torch.stack([right.float().mean(1), (right.float().var(1, correction=0) + EPSILON).rsqrt()])
    normed = F.layer_norm(right.double(), (96,), eps=EPSILON)
    plain_normed = left.T @ F.layer_norm(right, (96,), eps=EPSILON)
    for name, matrix in both_layouts(right).items():
        found = factors(both_layouts(left)["blocked"], matrix, rows)
        assert_close(name, found.to(BF16), plain, exact)
        found = factors(both_layouts(left)["blocked"], matrix, rows, statistics)
        assert_close(f"{name} normalised", found.to(BF16), plain_normed, left.double().T @ normed)


@pytest.mark.parametrize("rows, width", [(1, 32), (45, 96), (33, 768)])
def test_layer_norm_backward(rows, width):
    x, dxhat, dsum = (torch.randn(rows, width).to(BF16) for _ in range(3))
    statistics = torch.stack([x.float().mean(1), (x.float().var(1, correction=0) + EPSILON).rsqrt()])

    def gradient(dtype):
        leaf = x.to(dtype).requires_grad_()
        (found,) = torch.autograd.grad(F.layer_norm(leaf, (width,), eps=EPSILON), leaf, dxhat.to(dtype))
        return found

    exact, plain = gradient(torch.float64), gradient(BF16)
    for name, matrix in both_layouts(dxhat).items():
        alone = layer_norm_backward(matrix, x, statistics, None, torch.full_like(x, float("nan")))
        assert_close(name, alone, plain, exact)
        with_sum = layer_norm_backward(matrix, x, statistics, dsum, torch.full_like(x, float("nan")))
        assert_close(f"{name} and sum", with_sum, plain + dsum, exact + dsum.double())


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("rows", (1, 33, 77, 289))
def test_threads_give_equal_bits(rows, threads):
    x, w, bias = draw(rows, 768, 96)
    down, up = (torch.randn(32, 768) / 768**0.5).to(BF16), (torch.randn(96, 32) / 32**0.5).to(BF16)
    results = []
    before = torch.get_num_threads()
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            u, kept = blocked.empty(rows, 32), blocked.empty(rows, 96)
            statistics = torch.empty(2, rows)
            options = {"a2": u, "extra": pack(up), "down": pack(down), "statistics": statistics, "epsilon": EPSILON}
            options |= {"activation": "gelu", "kept": kept}
            c = gemm(x, pack(w), torch.empty(rows, 96, dtype=BF16), rows, bias, **options)
            results.append((c, blocked.to_rows(u, rows), blocked.to_rows(kept, rows), statistics))
    finally:
        torch.set_num_threads(before)
    for one, many in zip(*results, strict=True):
        assert torch.equal(one, many)
