"""The CPU's native operators, forward and backward, against the reference in plain PyTorch that they replace.

    python -m bench.native_ops [--only PATTERN] [--again] [--markdown] [--out FILE]

Adds a row for every operator, case, number format and number of threads to
`bench/results/<device>/native_ops.json`: the times of both, which take turns, and their largest relative errors against
float64. `--markdown` prints the rows that are there as a table and measures nothing.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from bench.record import Record, default_path
from bench.timing import interleave
from bench.tolerance import relative_error
from fastpeft import _native
from fastpeft._serve import GOES_ON, serve
from fastpeft.ops.adapter import adapter
from fastpeft.ops.choose import Chip, unavailable
from fastpeft.ops.layer_norm import add_layer_norm
from fastpeft.ops.linear_cross_entropy import linear_cross_entropy
from fastpeft.ops.mlp import mlp
from fastpeft.ops.prompt_attention import Words, prompt_attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Name -> batch, tokens, heads, head dimension.
MODELS = {"ViT-B/16": (8, 197, 12, 64), "ViT-H/14": (8, 257, 16, 80)}
BACKENDS = ("cpu", "reference")

# Runs one step with a backend in a number format and returns what it computed.
Step = Callable[[str, torch.dtype], list[Tensor]]


def differentiated(function: Callable[..., Tensor | tuple[Tensor, ...]], trained: list[Tensor], others: list) -> Step:
    """A step of function(backend, *trained, *others), with gradients of what is trained; None stays None."""
    upstream: list[Tensor] = []
    kept: dict[torch.dtype, tuple] = {}

    def step(backend: str, dtype: torch.dtype) -> list[Tensor]:
        if dtype not in kept:

            def cast(t):
                return t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t

            kept[dtype] = [cast(t).requires_grad_() for t in trained], [cast(t) for t in others]
        leaves, rest = kept[dtype]
        found = function(backend, *leaves, *rest)
        results = list(found) if isinstance(found, tuple) else [found]
        if not upstream:
            upstream.extend(torch.randn(t.shape) for t in results)
        down = [t.to(dtype) for t in upstream]
        return [t.detach() for t in results] + list(torch.autograd.grad(results, leaves, down))

    return step


def attention(model: str, prompts: int, bias: bool = False, causal: bool = False, dropout: float = 0.0, rows: int = 0):
    """Attention as a block asks for it: q, k and v side by side, rows before heads."""
    batch, tokens, heads, dim = MODELS[model]
    qkv = torch.randn(batch, tokens, 3, heads, dim)
    pair = [torch.randn(heads, prompts, dim) for _ in range(2)]
    mask = torch.randn(1, 1, tokens, tokens) if bias else None
    words = None
    if dropout:
        low, high = -(1 << 31), (1 << 31) - 1
        words = Words(
            torch.randint(low, high, (batch, heads, rows or tokens), dtype=torch.int32),
            torch.randint(low, high, (tokens + prompts,), dtype=torch.int32),
        )

    def run(backend, qkv, *others):
        prompts, mask = others[:-1], others[-1]
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return prompt_attention(
            q[:, :, :rows] if rows else q,
            k,
            v,
            *prompts,
            attn_mask=mask,
            causal=causal,
            dropout=dropout,
            words=words,
            backend=backend,
        )

    return differentiated(run, [qkv, *(pair if prompts else [])], [mask])


def norm(model: str, branch: bool) -> Step:
    """A frozen LayerNorm, with the residual sum before it if there is a branch."""
    batch, tokens, heads, dim = MODELS[model]
    d = heads * dim
    x = [torch.randn(batch, tokens, d) for _ in range(2 if branch else 1)]

    def run(backend, *tensors):
        *x, weight, bias = tensors
        s, y = add_layer_norm(x[0], x[1] if branch else None, None, weight, bias, 1e-6, backend)
        return (s, y) if branch else y

    return differentiated(run, x, [torch.randn(d), torch.randn(d)])


def layers(model: str, keep: str) -> Step:
    """A frozen MLP with GELU."""
    batch, tokens, heads, dim = MODELS[model]
    d = heads * dim
    weights = [torch.randn(4 * d, d) * d**-0.5, torch.randn(4 * d), torch.randn(d, 4 * d) * d**-0.5, torch.randn(d)]

    def run(backend, x, *weights):
        return mlp(x, *weights, "gelu", keep, backend)

    return differentiated(run, [torch.randn(batch, tokens, d)], weights)


def bottleneck(model: str, skip: bool) -> Step:
    """A trained adapter of 64 hidden units."""
    batch, tokens, heads, dim = MODELS[model]
    d = heads * dim
    factors = [torch.randn(64, d) * d**-0.5, torch.randn(64), torch.randn(d, 64) * 0.1, torch.randn(d)]

    def run(backend, x, *factors):
        return adapter(x, *factors, "gelu", 1.0, x if skip else None, backend)

    return differentiated(run, [torch.randn(batch, tokens, d), *factors], [])


def vocabulary(model: str) -> Step:
    """The loss of 120 rows over BERT's 30,522 word pieces, whose matrix is frozen."""
    _, _, heads, dim = MODELS[model]
    d = heads * dim
    frozen = [torch.randn(30522, d) * d**-0.5, torch.randn(30522), torch.randint(30522, (120,))]

    def run(backend, x, weight, bias, targets):
        return linear_cross_entropy(x, weight, bias, targets, backend)

    return differentiated(run, [torch.randn(120, d)], frozen)


# Operator, case -> what makes its step for a model, and in which formats it exists.
CASES: dict[tuple[str, str], tuple[Callable[[str], Step], tuple[str, ...]]] = {
    ("prompt_attention", "no prompts"): (lambda model: attention(model, 0), ("fp32", "bf16")),
    ("prompt_attention", "10 prompts"): (lambda model: attention(model, 10), ("fp32", "bf16")),
    ("prompt_attention", "200 prompts"): (lambda model: attention(model, 200), ("fp32", "bf16")),
    ("prompt_attention", "10 prompts, class token alone"): (
        lambda model: attention(model, 10, rows=1),
        ("fp32", "bf16"),
    ),
    ("prompt_attention", "causal"): (lambda model: attention(model, 0, causal=True), ("fp32", "bf16")),
    ("prompt_attention", "bias, 10 prompts"): (lambda model: attention(model, 10, bias=True), ("fp32", "bf16")),
    ("prompt_attention", "dropout 0.1"): (lambda model: attention(model, 0, dropout=0.1), ("fp32", "bf16")),
    ("layer_norm", "alone"): (lambda model: norm(model, False), ("fp32", "bf16")),
    ("layer_norm", "sum before it"): (lambda model: norm(model, True), ("fp32", "bf16")),
    ("mlp", "pre-activation kept"): (lambda model: layers(model, "preactivation"), ("fp32", "bf16")),
    ("mlp", "derivative kept in 8 bits"): (lambda model: layers(model, "derivative8"), ("bf16",)),
    ("adapter", "64 units, skip connection"): (lambda model: bottleneck(model, True), ("fp32", "bf16")),
    ("adapter", "64 units"): (lambda model: bottleneck(model, False), ("fp32", "bf16")),
    ("linear_cross_entropy", "120 rows, 30,522 tokens"): (vocabulary, ("fp32", "bf16")),
}


def rows() -> Iterator[tuple[str, str, str, str, int]]:
    """(operator, case, model, format, threads) of every row that this machine can have."""
    chip = Chip("cpu", list(_native.LEVELS).index(_native.cpu_level()))
    for (operator, case), (_, formats) in CASES.items():
        if unavailable(operator, "cpu", chip):
            continue
        for model in MODELS:
            for name in formats:
                for threads in (1, 2):
                    yield operator, case, model, name, threads


def measure(step: Step, dtype: torch.dtype, budget: float) -> dict[str, object]:
    """Times and errors of both backends."""
    exact = step("reference", torch.float64)
    errors = {
        name: max(relative_error(a, b) for a, b in zip(step(name, dtype), exact, strict=True)) for name in BACKENDS
    }
    del exact
    gc.collect()
    variants = {name: lambda name=name: step(name, dtype) for name in BACKENDS}
    times = interleave(variants, budget=budget, turns=100)
    row: dict[str, object] = {"speedup": times["reference"].median / times["cpu"].median}
    return row | {name: {**times[name].to_dict(), "worst_error": errors[name]} for name in BACKENDS}


def table(record: Record) -> str:
    """The rows as a table: how many times as fast, on one thread and on two."""
    formats = [(name, threads) for name in DTYPES for threads in (1, 2)]
    lines = ["| operator | case | model | " + " | ".join(f"{name}, {n} threads" for name, n in formats) + " |"]
    lines.append("|---" * (3 + len(formats)) + "|")
    for operator, case in CASES:
        for model in MODELS:
            cells = []
            for name, threads in formats:
                row = record.rows(operator).get(f"{case}, {model}, {name}, {threads} threads")
                cells.append("-" if row is None else f"{row['speedup']:.2f}")
            if set(cells) != {"-"}:
                lines.append(f"| {operator} | {case} | {model} | {' | '.join(cells)} |")
    return "\n".join(lines).replace("1 threads", "1 thread")


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing, or print what is there."""
    parser = argparse.ArgumentParser(prog="python -m bench.native_ops", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", help="pattern of the rows' names, such as 'layer_norm*fp32*'")
    parser.add_argument("--again", action="store_true", help="also rows that are there")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds a row")
    parser.add_argument("--markdown", action="store_true", help="print the table of the rows that are there")
    parser.add_argument("--out", type=Path, help="default: bench/results/<device>/native_ops.json")
    given = parser.parse_args(arguments)
    return serve(lambda: _serve(given), GOES_ON)


def _serve(given: argparse.Namespace) -> None:
    record = Record(given.out or default_path("cpu").with_name("native_ops.json"), "cpu")
    if given.markdown:
        print(table(record))
        return
    for operator, case, model, name, threads in rows():
        key = f"{case}, {model}, {name}, {threads} threads"
        if not fnmatch.fnmatch(f"{operator}, {key}", given.only) or (record.done(operator, key) and not given.again):
            continue
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        row = measure(CASES[operator, case][0](model), DTYPES[name], given.budget)
        record.add(operator, key, row | {"level": _native.cpu_level()})
        both = [f"{who} {row[who]['median_ms']:8.2f} ms, error {row[who]['worst_error']:.1e}" for who in BACKENDS]
        print(f"{operator:17}{key:66}{both[0]}   {both[1]}   {row['speedup']:.2f}x", flush=True)


if __name__ == "__main__":
    sys.exit(main())
