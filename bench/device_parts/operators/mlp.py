"""The frozen two-layer MLP: shapes; its reference is what it replaces."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.device_parts.operators import Cases, Rival
from bench.device_parts.problems import Problem, Tensors, Work, traffic
from fastpeft.ops import mlp as op
from fastpeft.ops.activation import FUNCTIONS

# A derivative in eight bits is off by up to 0.0025, in plain PyTorch as well, whose codes may be others.
_CAP_EIGHT_BITS = 2e-2


def problem(
    dtype: torch.dtype,
    device: torch.device,
    *,
    rows: int = 3 * 197,
    dim: int = 768,
    hidden: int = 3072,
    activation: str = "gelu",
    keep: str = "preactivation",
    bias: bool = True,
) -> Problem:
    """Draw a call.

    Args:
        dtype, device: of everything.
        rows, dim, hidden: sizes.
        activation: by name.
        keep: what the backward pass keeps.
        bias: of both layers.
    """

    def draw(*shape: int, size: float = 1.0) -> Tensor:
        return (size * torch.randn(*shape, device=device)).to(dtype)

    tensors: dict[str, Tensor | None] = {
        "x": draw(rows, dim),
        "weight1": draw(hidden, dim, size=1.5 / dim**0.5),
        "bias1": draw(hidden) if bias else None,
        "weight2": draw(dim, hidden, size=hidden**-0.5),
        "bias2": draw(dim) if bias else None,
    }
    names = ("x", "weight1", "bias1", "weight2", "bias2")

    def call(t: Tensors, backend: str) -> tuple[Tensor]:
        return (op.mlp(*(t[name] for name in names), activation, keep, backend),)

    def exact(t: Tensors) -> tuple[Tensor]:
        return (op.mlp(*(t[name] for name in names), activation, "preactivation", "reference"),)

    product, size, given = 2 * rows * dim * hidden, traffic(tensors["x"]), traffic(*tensors.values())
    eight = keep == "derivative8"
    work = Work(2 * product, 2 * product, given + size, given + size)
    cap = _CAP_EIGHT_BITS if eight and dtype != torch.bfloat16 else None
    return Problem(tensors, ("x",), ("y",), call, work, exact=exact, cap=cap)


def checked(tiny: bool) -> Cases:
    """What has to be right: what is kept, activations, widths."""
    if tiny:
        for keep in op.KEEPS:
            yield f"keeps {keep}", functools.partial(problem, rows=7, dim=48, hidden=96, keep=keep)
        return
    for keep in op.KEEPS:
        for activation in FUNCTIONS:
            yield f"{activation}, keeps {keep}", functools.partial(problem, activation=activation, keep=keep)
        yield f"ViT-H/14, keeps {keep}", functools.partial(problem, rows=2 * 257, dim=1280, hidden=5120, keep=keep)
        yield f"many rows, keeps {keep}", functools.partial(problem, rows=64 * 197, keep=keep)
        yield f"one row, keeps {keep}", functools.partial(problem, rows=1, keep=keep)
        yield f"no biases, keeps {keep}", functools.partial(problem, bias=False, keep=keep)
        yield f"odd widths, keeps {keep}", functools.partial(problem, dim=100, hidden=260, keep=keep)


def timed(tiny: bool) -> Cases:
    """Training steps' shapes, batch 64."""
    if tiny:
        yield "keeps preactivation", functools.partial(problem, rows=7, dim=48, hidden=96)
        return
    for keep in op.KEEPS:
        yield f"ViT-B/16, keeps {keep}", functools.partial(problem, rows=64 * 197, keep=keep)
    for keep in op.KEEPS:
        yield f"ViT-H/14, keeps {keep}", functools.partial(problem, rows=64 * 257, dim=1280, hidden=5120, keep=keep)


def rivals(given: Problem) -> dict[str, Rival]:
    """Both products without what lies between them, as cuBLAS computes them; the reference is plain PyTorch."""

    def products(t: Tensors) -> tuple[Tensor]:
        return (F.linear(F.linear(t["x"], t["weight1"], t["bias1"]), t["weight2"], t["bias2"]),)

    return {"products": Rival(products, comparable=False, floor=True)}
