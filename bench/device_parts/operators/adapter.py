"""The bottleneck adapter: shapes, and its layers one by one with factors that need no conversion."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.device_parts.operators import Cases, Rival
from bench.device_parts.problems import Problem, Tensors, Work, traffic
from fastpeft.ops.activation import FUNCTIONS
from fastpeft.ops.adapter import adapter

_FACTORS = ("down_weight", "down_bias", "up_weight", "up_bias")


def problem(
    dtype: torch.dtype,
    device: torch.device,
    *,
    rows: int = 3 * 197,
    dim: int = 768,
    hidden: int = 64,
    activation: str = "gelu",
    scale: float = 1.0,
    residual: str | None = "x",
    bias: bool = True,
    masters: bool = True,
    first: bool = False,
) -> Problem:
    """Draw a call.

    Args:
        dtype, device: of x.
        rows, dim, hidden: sizes.
        activation: by name.
        scale: of the up-projection.
        residual: "x", "other" or None.
        bias: of both layers.
        masters: factors in float32.
        first: x needs no gradient.
    """
    factor = torch.float32 if masters else dtype

    def draw(*shape: int, size: float = 1.0) -> Tensor:
        return (size * torch.randn(*shape, device=device)).to(factor)

    tensors: dict[str, Tensor | None] = {
        "x": draw(rows, dim).to(dtype),
        "down_weight": draw(hidden, dim, size=dim**-0.5),
        "down_bias": draw(hidden) if bias else None,
        "up_weight": draw(dim, hidden, size=hidden**-0.5),
        "up_bias": draw(dim) if bias else None,
    }
    if residual == "other":
        tensors["residual"] = draw(rows, dim).to(dtype)

    def skipped(t: Tensors) -> Tensor | None:
        return t["x"] if residual == "x" else t.get("residual")

    def call(t: Tensors, backend: str) -> tuple[Tensor]:
        return (adapter(t["x"], *(t[name] for name in _FACTORS), activation, scale, skipped(t), backend),)

    beside = ("residual",) if residual == "other" else ()
    wanted = (*(() if first else ("x", *beside)), *(name for name in _FACTORS if tensors[name] is not None))
    product, size = 2 * rows * dim * hidden, traffic(tensors["x"])
    given = traffic(*tensors.values())
    work = Work(
        # dh, dx and both factors; hidden units are kept or computed once more.
        forward_flops=2 * product,
        backward_flops=(3 if first else 4) * product,
        forward_bytes=given + size,
        backward_bytes=traffic(*(tensors[name] for name in ("x", *_FACTORS, *wanted))) + size,
    )
    found = Problem(tensors, wanted, ("y",), call, work)
    found.skipped, found.activation, found.scale = skipped, activation, scale
    return found


def checked(tiny: bool) -> Cases:
    """What has to be right: widths, activations, residuals, formats."""
    if tiny:
        yield "hidden 8", functools.partial(problem, rows=7, dim=48, hidden=8)
        yield (
            "hidden 3, relu, other residual",
            functools.partial(
                problem, rows=7, dim=48, hidden=3, activation="relu", scale=0.5, residual="other", bias=False
            ),
        )
        return
    # The second row is the VPT paper's: a width of 768 divided by 8, 64 and 256.
    for hidden in (8, 64, 256, 96, 12, 3):
        yield f"hidden {hidden}", functools.partial(problem, hidden=hidden)
    for activation in FUNCTIONS:
        if activation != "gelu":
            yield activation, functools.partial(problem, activation=activation)
    options = {
        "no residual, scaled": {"residual": None, "scale": 0.1},
        "other residual, scaled": {"residual": "other", "scale": 4.0},
        "no biases": {"bias": False},
        "factors in x's format": {"masters": False},
        "no gradient of x": {"first": True},
        "ViT-H/14 hidden 64": {"rows": 2 * 257, "dim": 1280},
        "ViT-L/16 hidden 256": {"dim": 1024, "hidden": 256},
        "one row": {"rows": 1},
        "odd width": {"dim": 100, "hidden": 20},
        "many rows": {"rows": 64 * 197},
    }
    for name, given in options.items():
        yield name, functools.partial(problem, **given)


def timed(tiny: bool) -> Cases:
    """Training steps' shapes, batch 64."""
    if tiny:
        yield "hidden 8", functools.partial(problem, rows=7, dim=48, hidden=8)
        return
    rows = 64 * 197
    for hidden, reduction in ((12, 64), (96, 8), (3, 256)):
        yield f"ViT-B/16 hidden {hidden} (reduction {reduction})", functools.partial(problem, rows=rows, hidden=hidden)
    for hidden in (64, 256):
        yield f"ViT-B/16 hidden {hidden}", functools.partial(problem, rows=rows, hidden=hidden)
    yield "ViT-H/14 hidden 64", functools.partial(problem, rows=64 * 257, dim=1280, hidden=64)


def rivals(given: Problem) -> dict[str, Rival]:
    """Layers one by one, as the reference, with factors that are in x's format already."""
    dtype = given.tensors["x"].dtype
    factors = {name: None if given.tensors[name] is None else given.tensors[name].to(dtype) for name in _FACTORS}
    trained = {name: t.requires_grad_(name in given.wanted) for name, t in factors.items() if t is not None}

    def layers(t: Tensors) -> tuple[Tensor]:
        h = FUNCTIONS[given.activation](F.linear(t["x"], trained["down_weight"], trained.get("down_bias")))
        y = given.scale * F.linear(h, trained["up_weight"], trained.get("up_bias"))
        skip = given.skipped(t)
        return (y if skip is None else skip + y,)

    return {"layers": Rival(layers, parameters=tuple(trained.values()), comparable=False)}
