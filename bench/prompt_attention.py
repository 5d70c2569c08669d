"""Attention over tokens and prompts, forward and backward: ours against torch's own over concatenated keys and values.

    python -m bench.prompt_attention [--device cpu] [--out FILE]

Prints one line a shape and adds it to `bench/results/<device>/ops.json`. Errors are relative, against float64.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.record import Record, default_path
from bench.timing import interleave
from fastpeft._serve import serve
from fastpeft.ops.prompt_attention import prompt_attention

# (batch, heads, queries, tokens, prompts, head dim)
SHAPES = {
    "ViT-S/14 112 px, 10 prompts": (32, 6, 65, 65, 10, 64),
    "ViT-B/16, 1 prompt": (16, 12, 197, 197, 1, 64),
    "ViT-B/16, 200 prompts": (16, 12, 197, 197, 200, 64),
    "ViT-B/16, class token alone": (16, 12, 1, 197, 10, 64),
    "ViT-H/14": (4, 16, 257, 257, 0, 80),
    "ViT-B/16 384 px": (4, 12, 577, 577, 0, 64),
    "ViT-B/16 448 px, 200 prompts": (2, 12, 785, 785, 200, 64),
}


def concatenated(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor) -> Tensor:
    """Torch's attention over keys and values with the prompts' in one tensor."""
    k, v = (torch.cat((t, p.expand(len(t), -1, -1, -1)), dim=2) for t, p in ((k, prompt_k), (v, prompt_v)))
    return F.scaled_dot_product_attention(q, k, v)


FUNCTIONS = {"ours": prompt_attention, "torch": concatenated}


def measure(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, budget: float) -> dict[str, object]:
    """Time and error of both on fresh random inputs of a shape."""
    batch, heads, queries, tokens, prompts, dim = shape
    rows = [
        torch.randn(batch, n, heads, dim, device=device).to(dtype).transpose(1, 2) for n in (queries, tokens, tokens)
    ]
    rows += [torch.randn(heads, prompts, dim, device=device).to(dtype) for _ in range(2)]
    inputs = [t.requires_grad_() for t in rows]
    trained = inputs if prompts else inputs[:3]
    dy = torch.randn_like(rows[0])

    def step(function) -> list[Tensor]:
        out = function(*inputs)
        return [out, *torch.autograd.grad(out, trained, dy)]

    times = interleave({name: lambda f=f: step(f) for name, f in FUNCTIONS.items()}, device=device, budget=budget)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    out = concatenated(*exact)
    true = [out, *torch.autograd.grad(out, exact[: len(trained)], dy.double())]
    row: dict[str, object] = {"dtype": str(dtype), "speedup": times["torch"].median / times["ours"].median}
    for name, function in FUNCTIONS.items():
        pairs = [(a.double(), b) for a, b in zip(step(function), true, strict=True)]
        error = max(((a - b).norm() / b.norm()).item() for a, b in pairs)
        row[name] = {**times[name].to_dict(), "worst_error": error}
    return row


def main(arguments: list[str] | None = None) -> int:
    """Measure every shape and write the file."""
    parser = argparse.ArgumentParser(prog="python -m bench.prompt_attention", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--budget", type=float, default=3.0, help="seconds a shape")
    parser.add_argument("--out", type=Path, help="default: bench/results/<device>/ops.json")
    given = parser.parse_args(arguments)
    return serve(lambda: _serve(given), "the file has the shapes that were measured")


def _serve(arguments: argparse.Namespace) -> None:
    device = torch.device(arguments.device)
    record = Record(arguments.out or default_path(device).with_name("ops.json"), device)
    for name, shape in SHAPES.items():
        row = measure(shape, getattr(torch, arguments.dtype), device, arguments.budget)
        record.add("prompt_attention", f"{name}, {arguments.dtype}, {torch.get_num_threads()} threads", row)
        both = [f"{n} {row[n]['median_ms']:8.2f} ms, error {row[n]['worst_error']:.1e}" for n in FUNCTIONS]
        print(f"{name:32}{both[0]}   {both[1]}   {row['speedup']:.2f}x", flush=True)


if __name__ == "__main__":
    sys.exit(main())
