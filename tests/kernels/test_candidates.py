"""Every candidate of every kernel computes what the table's choice does, and is one that a chip may be given."""

from __future__ import annotations

import functools
import math

import pytest
import torch

pytest.importorskip("triton")

from bench.kernels import candidate_cases_of, cases_of, operators
from fastpeft.kernels import _choices, _tune, adapter, layer_norm, lora_linear, mlp, prompt_attention
from fastpeft.kernels._launch import recording
from fastpeft.kernels._tune import forget, tuning
from tests.thinned import sampled

HALF = torch.float16


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(_choices.VARIABLE, str(tmp_path))
    monkeypatch.delenv(_tune.VARIABLE, raising=False)
    forget()
    yield
    forget()


def draw(*shape, dtype=HALF, scale=1.0):
    return (torch.randn(*shape) * scale).to(dtype)


def norm(rows=20, columns=384, sums=True):
    x, branch, dy = (draw(2, rows, columns) for _ in range(3))
    weight, bias, gamma = (draw(columns) for _ in range(3))
    y, s, mean, rstd = layer_norm.forward(x, weight, bias, 1e-6, branch=branch, gamma=gamma)
    found = layer_norm.backward(
        dy, s, weight, mean, rstd, gamma=gamma, needs_branch=True, needs_bias=sums, needs_weight=sums
    )
    return y, s, *found


def lora(variant, rows=70, inner=80, columns=96, terms=((0, 32, 8), (64, 96, 4)), masters=True):
    x, weight, dy = draw(rows, inner), draw(columns, inner, scale=inner**-0.5), draw(rows, columns)
    factor = torch.float32 if masters else HALF
    terms = [
        (draw(rank, inner, dtype=factor, scale=inner**-0.5), draw(stop - start, rank, dtype=factor), 0.5, start, stop)
        for start, stop, rank in terms
    ]
    y, h = lora_linear.forward(x, weight, draw(columns), terms, variant=variant)
    dx, factors = lora_linear.backward(dy, x, weight, terms, h, variant=variant)
    return y, dx, *(gradient for pair in factors for gradient in pair)


def perceptron(variant, keep, rows=70, inner=48, columns=160):
    x, first, second = draw(rows, inner), draw(columns, inner, scale=0.2), draw(inner, columns, scale=0.2)
    # fp32, so that the bias is still to be added to what is kept.
    a, kept = mlp.forward(x, first, draw(columns, dtype=torch.float32), "gelu", keep=keep, variant=variant)
    return a, mlp.backward_input(draw(rows, inner), second, kept, "gelu", keep=keep, variant=variant)


def bottleneck(rows=70, columns=96, hidden=32):
    x, dy = draw(rows, columns), draw(rows, columns)
    factors = draw(hidden, columns, scale=0.1), draw(hidden), draw(columns, hidden, scale=0.1), draw(columns)
    y = adapter.forward(x, *factors, "gelu", 0.5, residual=x)
    return y, *adapter.backward(dy, x, *factors, "gelu", 0.5, skip=True)


def attention(tokens=70, prompts=20, width=32, kind="shared", **options):
    q, k, v = draw(2, tokens, 3, 2, width).permute(2, 0, 3, 1, 4)
    group = {"shared": (), "sample": (2,)}[kind]
    both = draw(*group, prompts, 2, 2, width)
    prompt_k, prompt_v = (t.transpose(-3, -2) for t in both.unbind(-3))
    given = (q, k, v, prompt_k, prompt_v)
    out, lse = prompt_attention.forward(*given, scale=width**-0.5, **options)
    return out, *prompt_attention.backward(draw(*out.shape), *given, out, lse, scale=width**-0.5, **options)


QUICK = {
    "layer_norm": norm,
    "lora_linear, beside": functools.partial(lora, "beside"),
    "lora_linear, fused": functools.partial(lora, "fused"),
    "mlp, beside": functools.partial(perceptron, "beside", "preactivation"),
    "mlp, 8 bits, beside": functools.partial(perceptron, "beside", "derivative8"),
    "mlp, fused": functools.partial(perceptron, "fused", "preactivation"),
    "adapter": bottleneck,
    "prompt_attention": attention,
}
FULL = {
    "layer_norm, many columns": functools.partial(norm, 33, 1500),
    "layer_norm, few columns, no sums": functools.partial(norm, 200, 64, sums=False),
    "lora_linear, beside, wide": functools.partial(lora, "beside", 257, 320, 480, ((0, 160, 64), (160, 320, 64))),
    "lora_linear, fused, wide": functools.partial(lora, "fused", 257, 320, 480, ((0, 480, 64),), masters=False),
    "mlp, 8 bits, fused": functools.partial(perceptron, "fused", "derivative8", 197, 128, 512),
    "adapter, wide": functools.partial(bottleneck, 197, 128, 128),
    "prompt_attention, ragged, causal": functools.partial(attention, 197, 50, 64, causal=True),
    "prompt_attention, 80 columns": functools.partial(attention, 130, 17, 80, "sample"),
    "prompt_attention, 128 columns": functools.partial(attention, 97, 10, 128),
}


def last(runs):
    """Times by which the last candidate is the fastest."""
    return [float(len(runs) - index) for index in range(len(runs))]


def check(problem):
    state = torch.get_rng_state()
    with tuning(False):
        expected = problem()
    torch.set_rng_state(state)
    with tuning(timer=last) as found:
        results = problem()
    assert found
    for label, entry in found.items():
        assert entry["measured"] > 1 and entry["refused"] == [], label
        assert entry["choice"] != entry["table"]
    for value, exact in zip(results, expected, strict=True):
        assert (value is None) == (exact is None)
        if exact is None:
            continue
        # One kernel's rounding goes through the next.
        assert torch.linalg.vector_norm((value - exact).float()) <= 4e-3 * torch.linalg.vector_norm(exact.float())
    return found


@pytest.mark.parametrize("problem", QUICK.values(), ids=QUICK.keys())
def test_candidates_agree_with_the_table(problem):
    check(problem)


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(FULL, 2))
def test_candidates_agree_with_the_table_on_larger_shapes(name):
    check(FULL[name])


def test_every_kernel_but_the_smallest_is_tuned():
    tuned = {"layer_norm": 2, "lora_linear": 5, "mlp": 4, "adapter": 3, "prompt_attention": 4}
    assert set(tuned) == set(operators())
    for operator, count in tuned.items():
        names = set()
        for case in candidate_cases_of(operator).values():
            with recording(90) as tables:
                case()
            with recording(90, candidates=True) as all_of_them:
                case()
            names |= {
                launch.name
                for launch in all_of_them
                if sum(other.name == launch.name for other in all_of_them)
                > sum(other.name == launch.name for other in tables)
            }
        assert len(names) == count, names


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("operator", operators())
def test_candidates_are_launches_that_exist(operator, capability):
    for case in cases_of(operator).values():
        with recording(capability, candidates=True) as launches:
            case()
        for launch in launches:
            assert launch.num_warps in (1, 2, 4, 8) and 1 <= launch.num_stages <= 4, launch
            sizes = {k: v for k, v in launch.arguments.items() if k.startswith(("BLOCK", "ROWS"))}
            assert all(size > 0 and math.log2(size).is_integer() for size in sizes.values()), sizes
            if launch.name.startswith(("lora", "prompt_attention_f", "prompt_attention_q", "adapter", "mlp_forward_f")):
                assert min(sizes.values()) >= 16, (launch.name, sizes)


def test_chips_without_matrix_instructions_have_no_candidates_for_products():
    x, weight = (torch.empty(512, 256, dtype=HALF, device="meta") for _ in range(2))
    for variant, count in (("fused", 1), ("beside", 5)):
        with recording(75, candidates=True) as launches:
            mlp.forward(x, weight, None, "gelu", variant=variant)
        assert len(launches) == count
