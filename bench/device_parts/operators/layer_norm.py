"""LayerNorm, with and without the residual sum before it: shapes, and Liger's kernel."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from bench.device_parts.operators import Cases, Rival
from bench.device_parts.problems import Problem, Tensors, Work, traffic
from bench.device_parts.rows import Unavailable
from fastpeft.ops.layer_norm import add_layer_norm, layer_norm

_EPS = 1e-6


def problem(
    dtype: torch.dtype,
    device: torch.device,
    *,
    shape: tuple[int, ...] = (3, 197, 768),
    branch: bool = False,
    scaled: bool = False,
    affine: str = "frozen",
    masters: bool = False,
    cut: bool = False,
) -> Problem:
    """Draw a call.

    Args:
        dtype, device: of the inputs.
        shape: (..., d).
        branch: add a branch first.
        scaled: times a LayerScale.
        affine: "frozen", "trained", "shift" (the bias alone is trained) or "none" (there is no weight and no bias).
        masters: weight and bias in float32.
        cut: the first rows of every sample of a longer tensor.
    """

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    x = draw(shape[0], shape[1] + 5, *shape[2:])[:, : shape[1]] if cut else draw(*shape)
    tensors: dict[str, Tensor | None] = {"x": x + 0.5 if not cut else x, "weight": None, "bias": None}
    if affine != "none":
        factor = torch.float32 if masters else dtype
        tensors |= {"weight": (1 + 0.3 * draw(shape[-1])).to(factor), "bias": draw(shape[-1]).to(factor)}
    if branch:
        tensors["branch"] = draw(*shape)
        if scaled:
            tensors["gamma"] = draw(shape[-1])

    def call(t: Tensors, backend: str) -> tuple[Tensor, ...]:
        if not branch:
            return (layer_norm(t["x"], t["weight"], t["bias"], _EPS, backend),)
        return add_layer_norm(t["x"], t["branch"], t.get("gamma"), t["weight"], t["bias"], _EPS, backend)

    trained = {"trained": ("weight", "bias"), "shift": ("bias",)}.get(affine, ())
    wanted = ("x", *(("branch",) if branch else ()), *trained)
    size = traffic(x)
    # With a branch the sum is written, read again and has a gradient of its own; a scaled branch has another gradient
    # than x.
    work = Work(0, 0, (4 if branch else 2) * size, (4 + scaled if branch else 3) * size)
    return Problem(tensors, wanted, ("sum", "y") if branch else ("y",), call, work)


def checked(tiny: bool) -> Cases:
    """What has to be right: widths, trained and frozen affines, strides."""
    if tiny:
        yield "(2, 5, 48)", functools.partial(problem, shape=(2, 5, 48), affine="trained")
        yield "(2, 5, 48) sum", functools.partial(problem, shape=(2, 5, 48), branch=True, scaled=True)
        return
    shapes = [(3, 197, 768), (2, 257, 1280), (2, 577, 1024), (8, 1, 768), (2, 785, 384), (3, 49, 100), (2, 17, 4096)]
    for shape in shapes:
        yield f"{shape}", functools.partial(problem, shape=shape)
        yield f"{shape} sum", functools.partial(problem, shape=shape, branch=True)
    options = {
        "trained": {"affine": "trained"},
        "trained, sum": {"affine": "trained", "branch": True},
        "trained, fp32": {"affine": "trained", "masters": True},
        "shift, fp32, sum": {"affine": "shift", "masters": True, "branch": True},
        "scaled sum": {"branch": True, "scaled": True},
        "scaled sum, trained": {"branch": True, "scaled": True, "affine": "trained"},
        "no affine": {"affine": "none"},
        "first rows": {"cut": True, "affine": "trained"},
        "first rows, sum": {"cut": True, "branch": True},
        "many rows": {"shape": (64, 197, 768), "affine": "trained", "branch": True},
    }
    for name, given in options.items():
        yield name, functools.partial(problem, **given)


def timed(tiny: bool) -> Cases:
    """Training steps' shapes, batch 64."""
    if tiny:
        yield "(2, 5, 48) sum", functools.partial(problem, shape=(2, 5, 48), branch=True)
        return
    yield "ViT-B/16 sum", functools.partial(problem, shape=(64, 197, 768), branch=True)
    yield "ViT-B/16", functools.partial(problem, shape=(64, 197, 768))
    yield "ViT-B/16 sum, trained", functools.partial(problem, shape=(64, 197, 768), branch=True, affine="trained")
    yield "ViT-H/14 sum", functools.partial(problem, shape=(64, 257, 1280), branch=True)


def rivals(given: Problem) -> dict[str, Rival]:
    """Liger's LayerNorm, behind a sum by torch; it always computes the gradients of weight and bias."""

    def liger(t: Tensors) -> tuple[Tensor, ...]:
        if importlib.util.find_spec("liger_kernel") is None:
            raise Unavailable("liger_kernel is not installed")
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        if "branch" not in t:
            return (LigerLayerNormFunction.apply(t["x"], t["weight"], t["bias"], _EPS),)
        s = t["x"] + t["branch"]
        return s, LigerLayerNormFunction.apply(s, t["weight"], t["bias"], _EPS)

    return {"liger": Rival(liger)}
