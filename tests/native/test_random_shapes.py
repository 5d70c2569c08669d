"""The native operators on shapes, options and numbers drawn at random, against float64.

A few hundred draws each by default, the same in every run so that a gate does not depend on luck; 10,000 with
`-m slow`, afresh in every run, which says from which seed. The environment variable FASTPEFT_TEST_SEED repeats one or
starts elsewhere; that of a single draw begins with that draw.

A draw is held to twice the error of plain PyTorch in the same format and some roundings, since a handful of numbers is
too small a sample of rounding errors; all draws together, by their root mean square, to twice that error and one
rounding. One draw in a thousand may be beyond its bound, though by no more than four times, and is then left out of
what is taken together: three columns that are nearly the same, or a sum that cancels to nothing, magnify the roundings
of anybody; so does dP - sum(dO O), where one key has nearly all the weight.
"""

from __future__ import annotations

import math
import os
import random
import secrets
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.tolerance import relative_error
from fastpeft import _native
from fastpeft.native import blocked
from fastpeft.native.gemm import gemm, pack
from fastpeft.native.vector import library, mlp
from fastpeft.ops import mlp as mlp_operator
from fastpeft.ops.activation import DERIVATIVES, FUNCTIONS
from tests.native import test_adapter, test_layer_norm, test_mlp, test_prompt_attention
from tests.native.amx import both_layouts, needs_amx, outputs
from tests.native.conftest import HERE

SEED = "FASTPEFT_TEST_SEED"
# Roundings that a single draw may be off, beyond twice what plain PyTorch is.
_ROUNDINGS = {torch.float32: 24, torch.bfloat16: 4}
# Results are of the order of 0.1 to 1: what is smaller is left of terms that cancel.
_SMALL = 0.1
# Of how many draws one may be beyond its bound, and by how much.
_RARE, _BEYOND = 1000, 4

BF16 = torch.bfloat16
# Name -> (ours, plain in the same format, exact).
Results = dict[str, tuple[Tensor, Tensor, Tensor]]


def draw_layer_norm() -> Results:
    dimensions = random.choice((1, 2, 3, 4))
    shape = (*(random.randint(1, 9) for _ in range(dimensions - 1)), random.randint(3, 150))
    dtype = random.choice((torch.float32, BF16))
    branch = random.random() < 0.6
    inputs, dy, ds = test_layer_norm.draw(
        shape, dtype, branch, gamma=random.random() < 0.5, affine=random.random() < 0.7,
        parameters=random.choice((dtype, torch.float32)), offset=random.choice((0.0, 3.0)),
    )  # fmt: skip
    if random.random() < 0.3 and len(shape) > 1:
        inputs["x"] = spread(inputs["x"])
        dy = dy.transpose(0, -2).contiguous().transpose(0, -2)
    exact = test_layer_norm.plain(inputs, dy, ds, torch.float64)
    plain = test_layer_norm.plain(inputs, dy, ds, dtype)
    # Parameters in fp32 have gradients that are as good as the rows are.
    return {name: (t.to(dtype), plain[name], exact[name]) for name, t in test_layer_norm.ours(inputs, dy, ds).items()}


def spread(t: Tensor, between: float = float("nan")) -> Tensor:
    """The same numbers with others between the rows."""
    wide = torch.full((*t.shape[:-1], t.shape[-1] + random.randint(1, 9)), between, dtype=t.dtype)
    wide[..., : t.shape[-1]] = t
    return wide[..., : t.shape[-1]]


def draw_mlp() -> Results:
    dtype = random.choice((torch.float32, BF16))
    x, weight1, bias1, weight2, dy = test_mlp.draw(
        random.randint(1, 20), random.randint(1, 40), random.randint(1, 150), dtype,
        random.choice((dtype, torch.float32)),
    )  # fmt: skip
    if random.random() < 0.2:
        bias1 = None
    activation = random.choice(list(FUNCTIONS))
    keep = random.choice(("preactivation", "nothing", "derivative8") if dtype == BF16 else ("preactivation", "nothing"))
    # torch's own bf16 product multiplies what is between rows by zero.
    a, kept = mlp.forward(spread(x, 7.0), weight1, bias1, activation, keep=keep)
    exact_a, exact_dz = test_mlp.plain(x, weight1, bias1, weight2, dy, activation, torch.float64)
    plain_a, plain_kept = mlp_operator.hidden(x, weight1, None if bias1 is None else bias1.to(dtype), activation, keep)
    if keep == "nothing":
        kept = plain_kept = torch.nn.functional.linear(x, weight1, None if bias1 is None else bias1.to(dtype))
    dz = mlp.backward_input(dy, weight2, kept, activation, keep=keep)
    plain_dz = mlp_operator.hidden_gradient(dy, weight2, plain_kept, activation, keep)
    if activation == "relu":
        # Roundings may move a number across the kink, where the slope jumps.
        z = torch.nn.functional.linear(x.double(), weight1.double(), None if bias1 is None else bias1.double())
        near = z.abs() < (1e-4 if dtype == torch.float32 else 0.2)
        dz, plain_dz, exact_dz = (t.masked_fill(near, 0.0) for t in (dz, plain_dz, exact_dz))
    return {"a": (a, plain_a, exact_a), f"dz, {keep}": (dz, plain_dz, exact_dz)}


def draw_adapter() -> Results:
    dtype = random.choice((torch.float32, BF16))
    case = test_adapter.draw(
        random.randint(1, 30), random.randint(1, 60), random.randint(1, 40), dtype,
        random.choice((dtype, torch.float32)), biases=random.random() < 0.7,
    )  # fmt: skip
    activation = random.choice([name for name in FUNCTIONS if name != "relu"])
    scale, skip = random.choice((1.0, 0.3)), random.random() < 0.5
    residual = torch.randn_like(case["x"]) if not skip and random.random() < 0.5 else None
    factors = [case[name] for name in test_adapter.NAMES]
    beside = case["x"] if skip else residual
    found = {"y": test_adapter.adapter.forward(*factors, activation, scale, residual=beside)}
    gradients = test_adapter.adapter.backward(case["dy"], *factors, activation, scale, skip=skip)
    found |= {f"d{name}": t for name, t in zip(test_adapter.NAMES, gradients, strict=True) if t is not None}
    exact = test_adapter.plain(case, activation, scale, residual, skip, torch.float64)
    plain = test_adapter.plain(case, activation, scale, residual, skip, dtype)
    return {name: (t.to(dtype), plain[name], exact[name]) for name, t in found.items()}


def draw_attention(dtype: torch.dtype | None = None, plain: bool = False) -> Results:
    packed = random.random() < 0.3
    rows = random.choice((1, 2, 4, random.randint(1, 70), random.randint(1, 70)))
    tokens = random.randint(1, 70)
    batch, heads = random.randint(1, 3), random.randint(1, 3)
    options: dict = {}
    if not plain and random.random() < 0.5:
        options["causal"] = random.random() < 0.4
        options["dropout"] = random.choice((0.0, 0.2, 0.7))
        if random.random() < 0.5:
            full = (batch, heads, tokens if packed else rows, tokens)
            options["bias"] = tuple(random.choice((1, n)) for n in full)[random.randint(0, 4) :]
    case = test_prompt_attention.Case(
        tokens if packed else rows, tokens, random.choice((None, 0, 1, 3, random.randint(1, 40))),
        random.choice(("shared", "per_sample", "bank")), random.choice((32, 64, 80, random.randint(1, 140))), batch,
        heads, dtype or random.choice((torch.float32, BF16)), packed=packed, **options,
    )  # fmt: skip
    exact, baseline = case.plain(torch.float64), case.plain(case.dtype)
    found = case.ours()
    assert torch.equal(found["lse"].isfinite(), exact["lse"].isfinite())
    return {name: (t, baseline[name], exact[name]) for name, t in found.items() if name != "lse"}


def draw_amx_attention() -> Results:
    library.level = lambda: "amx"
    return draw_attention(BF16, plain=True)


def draw_amx_gemm() -> Results:
    rows, depth = random.randint(1, 100), 32 * random.choice((1, 2, 3, random.randint(1, 20), 33))
    columns = 32 * random.randint(1, 5)
    x, bias = torch.randn(rows, depth).to(BF16), torch.randn(columns)
    w = (torch.randn(columns, depth) / depth**0.5).to(BF16)
    a = random.choice(list(both_layouts(x).values()))
    to = random.choice(("row-major", "blocked"))
    exact = x.double() @ w.double().T
    plain = (x.float() @ w.float().T).to(BF16)
    kind = random.choice(("store", "residual", "activate", "scale"))
    options: dict = {"bias": bias}
    if kind == "scale":
        options = {"kept": blocked.from_rows(torch.randn(rows, columns).to(BF16))}
        kept = blocked.to_rows(options["kept"], rows)
        exact, plain = exact * kept.double(), plain * kept
    else:
        exact, plain = exact + bias.double(), plain + bias.to(BF16)
    if kind == "residual":
        other = torch.randn(rows, columns).to(BF16)
        options["other"] = both_layouts(other)[to]
        exact, plain = exact + other.double(), plain + other
    if kind == "activate":
        options["activation"] = random.choice(list(FUNCTIONS))
        options["kept"] = random.choice((None, blocked.empty(rows, columns)))
        z, plain_z = exact, plain
        exact, plain = FUNCTIONS[options["activation"]](z), FUNCTIONS[options["activation"]](plain)
    c = gemm(a, pack(w), outputs(rows, columns)[to], rows, **options)
    found = {kind: (blocked.to_rows(c, rows) if c.dim() == 4 else c, plain, exact)}
    if kind == "activate" and options["kept"] is not None and options["activation"] != "relu":
        slope = DERIVATIVES[options["activation"]]
        found["kept"] = (blocked.to_rows(options["kept"], rows), slope(plain_z), slope(z))
    return found


DRAWS: dict[str, Callable[[], Results]] = {
    "layer_norm": draw_layer_norm,
    "mlp": draw_mlp,
    "adapter": draw_adapter,
    "prompt_attention": draw_attention,
    "amx_attention": draw_amx_attention,
    "amx_gemm": draw_amx_gemm,
}


def error(value: Tensor, exact: Tensor) -> float:
    """Relative error, of numbers much smaller than 1 in comparison with them."""
    return relative_error(value, exact, max(float(exact.double().norm()), _SMALL * math.sqrt(max(1, exact.numel()))))


def run(operator: str, count: int, first: int) -> None:
    """Draw, compare, and compare all together."""
    first = int(os.environ.get(SEED) or first)
    print(f"{SEED}={first}")
    pooled: dict[tuple[str, torch.dtype], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    beyond: list[str] = []
    threads = torch.get_num_threads()
    level = library.level
    try:
        for seed in range(first, first + count):
            torch.manual_seed(seed)
            random.seed(seed)
            torch.set_num_threads(1)
            chosen = random.choice(HERE)
            library.level = lambda chosen=chosen: chosen
            for name, (value, plain, exact) in DRAWS[operator]().items():
                assert value.dtype == plain.dtype and value.shape == exact.shape, (name, seed)
                if not exact.any():
                    # One key alone is seen: what is left of terms that cancel has no size to be compared with. Up to
                    # 210 rows' share is summed, of a rounding or two each.
                    assert not (value.abs() > 420 * torch.finfo(value.dtype).eps).any(), f"{name}; {SEED}={seed}"
                    continue
                found, baseline = error(value, exact), error(plain, exact)
                allowed = 2 * baseline + _ROUNDINGS[value.dtype] * torch.finfo(value.dtype).eps
                if not found <= allowed:
                    beyond.append(f"{name} on {chosen}: error {found:.2e}, bound {allowed:.2e}; {SEED}={seed}")
                    assert found <= _BEYOND * allowed, beyond[-1]
                    continue
                sums = pooled[name, value.dtype]
                sums[0] += found**2
                sums[1] += baseline**2
                sums[2] += 1
    finally:
        torch.set_num_threads(threads)
        library.level = level
    assert len(beyond) <= max(1, count // _RARE), beyond
    for (name, dtype), (ours, plain, number) in pooled.items():
        found, baseline = math.sqrt(ours / number), math.sqrt(plain / number)
        allowed = 2 * baseline + torch.finfo(dtype).eps
        assert found <= allowed, f"{name} in {dtype}: error {found:.2e} of all, bound {allowed:.2e}; {SEED}={first}"


OPERATORS = [pytest.param(name, marks=needs_amx) if name.startswith("amx") else pytest.param(name) for name in DRAWS]


@pytest.mark.parametrize("operator", OPERATORS)
def test_some_hundred_draws(operator, poisoned_memory):
    run(operator, 200, first=0)


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
def test_ten_thousand_draws(operator):
    run(operator, 10_000, first=secrets.randbelow(1 << 40))


def test_a_wrong_element_would_be_seen(monkeypatch):
    inner = mlp.forward

    def wrong(*args, **kwargs):
        a, kept = inner(*args, **kwargs)
        a.view(-1)[-1] += 1.0
        return a, kept

    monkeypatch.setattr(mlp, "forward", wrong)
    with pytest.raises(AssertionError, match=r"a on .*: error"):
        run("mlp", 20, first=0)


def test_the_levels_that_are_drawn():
    assert set(HERE) <= set(_native.LEVELS) and "none" in HERE
