"""A frozen linear layer with low-rank terms: shapes, the products one by one, peft's layer, the frozen product."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.device_parts.operators import Cases, Rival
from bench.device_parts.problems import Problem, Tensors, Work, traffic
from fastpeft._compat import import_timm
from fastpeft.ops.lora_linear import LowRankTerm, lora_linear

_SCALE = 2.0


def problem(
    dtype: torch.dtype,
    device: torch.device,
    *,
    rows: int = 3 * 197,
    inner: int = 768,
    parts: Sequence[int] = (768, 768, 768),
    ranks: Sequence[int] = (8, 0, 8),
    whole: int = 0,
    masters: bool = True,
    faint: bool = False,
    first: bool = False,
) -> Problem:
    """Draw a call.

    Args:
        dtype, device: of x and the layer.
        rows, inner: of x.
        parts: widths of the output's parts.
        ranks: of the term on each part; 0 for none.
        whole: rank of a single term over all parts, instead.
        masters: factors in float32.
        faint: a layer so weak that the terms, not it, are what is compared.
        first: x needs no gradient, as in a model's first block.
    """
    out = sum(parts)

    def draw(*shape: int, size: float = 1.0) -> Tensor:
        return size * torch.randn(*shape, device=device)

    tensors: dict[str, Tensor | None] = {
        "x": draw(rows, inner).to(dtype),
        "weight": draw(out, inner, size=(1e-4 if faint else 1.0) / inner**0.5).to(dtype),
        "bias": draw(out, size=1e-4 if faint else 1.0).to(dtype),
    }
    starts = [sum(parts[:index]) for index in range(len(parts))]
    spans = [(s, s + w, r) for s, w, r in zip(starts, parts, ranks, strict=True) if r] if not whole else []
    spans = spans or [(0, out, whole)]
    factor = torch.float32 if masters else dtype
    for index, (start, stop, rank) in enumerate(spans):
        tensors[f"a{index}"] = draw(rank, inner, size=inner**-0.5).to(factor)
        tensors[f"b{index}"] = draw(stop - start, rank, size=0.3 / rank**0.5).to(factor)

    def terms(t: Tensors) -> list[LowRankTerm]:
        return [LowRankTerm(t[f"a{i}"], t[f"b{i}"], _SCALE, *span[:2]) for i, span in enumerate(spans)]

    def call(t: Tensors, backend: str) -> list[Tensor]:
        return lora_linear(t["x"], t["weight"], t["bias"], terms(t), parts, backend)

    factors = tuple(name for index in range(len(spans)) for name in (f"a{index}", f"b{index}"))
    wanted = (*(() if first else ("x",)), *factors)
    product, low = 2 * rows * inner * out, sum(2 * rows * r * (inner + stop - start) for start, stop, r in spans)
    given = traffic(*tensors.values())
    size = tensors["x"].element_size() * rows
    work = Work(
        forward_flops=product + low,
        # Of each pair dA and dB, and if x has a gradient, its part of that.
        backward_flops=(0 if first else product) + 2 * low,
        forward_bytes=given + size * out,
        backward_bytes=given + size * out + traffic(*(tensors[name] for name in wanted)),
    )
    outputs = tuple(f"part{index}" for index in range(len(parts)))
    found = Problem(tensors, wanted, outputs, call, work)
    found.spans, found.parts = spans, tuple(parts)
    return found


def checked(tiny: bool) -> Cases:
    """What has to be right: slices, ranks, widths, formats."""
    if tiny:
        sizes = {"rows": 7, "inner": 48, "parts": (32, 32, 32)}
        yield "q, v r=2", functools.partial(problem, ranks=(2, 0, 2), **sizes)
        yield "one term r=3", functools.partial(problem, ranks=(0, 0, 0), whole=3, **sizes)
        return
    qv, qkv = (1, 0, 1), (1, 1, 1)
    for rank in (1, 8, 64):
        for name, places in (("q, v", qv), ("q, k, v", qkv)):
            yield f"ViT-B/16 {name} r={rank}", functools.partial(problem, ranks=[rank * on for on in places])
    vit_h = {"rows": 2 * 257, "inner": 1280, "parts": (1280,) * 3}
    options = {
        "ViT-L/16 q, v r=8": {"inner": 1024, "parts": (1024,) * 3},
        "ViT-H/14 q, k, v r=64": {**vit_h, "ranks": (64,) * 3},
        "ViT-H/14 q, v r=8": vit_h,
        "one term over q, k, v r=8": {"ranks": (0, 0, 0), "whole": 8},
        "fc1 r=8": {"parts": (3072,), "ranks": (8,)},
        "fc2 r=8": {"inner": 3072, "parts": (768,), "ranks": (8,)},
        "proj r=1": {"parts": (768,), "ranks": (1,)},
        "unequal ranks": {"ranks": (1, 64, 8)},
        "factors in x's format": {"masters": False},
        "weak layer r=8": {"faint": True},
        "weak layer r=64": {"faint": True, "ranks": (64, 0, 64)},
        "no gradient of x": {"first": True},
        "one row": {"rows": 1},
        "keys and values of prompts": {"rows": 200, "parts": (768, 768), "ranks": (0, 8)},
        "class tokens": {"rows": 64},
        "many rows": {"rows": 64 * 197},
    }
    for name, given in options.items():
        yield name, functools.partial(problem, **given)


def timed(tiny: bool) -> Cases:
    """Training steps' shapes, batch 64."""
    if tiny:
        yield "q, k, v r=2", functools.partial(problem, rows=7, inner=48, parts=(32,) * 3, ranks=(2,) * 3)
        return
    rows = 64 * 197
    yield "ViT-B/16 q, k, v r=8", functools.partial(problem, rows=rows, ranks=(8, 8, 8))
    yield "ViT-B/16 q, v r=8", functools.partial(problem, rows=rows)
    yield "ViT-B/16 fc1 r=8", functools.partial(problem, rows=rows, parts=(3072,), ranks=(8,))
    yield "ViT-B/16 fc2 r=8", functools.partial(problem, rows=rows, inner=3072, parts=(768,), ranks=(8,))
    vit_h = {"rows": 64 * 257, "inner": 1280, "parts": (1280,) * 3}
    yield "ViT-H/14 q, k, v r=8", functools.partial(problem, ranks=(8,) * 3, **vit_h)
    yield "ViT-H/14 q, k, v r=64", functools.partial(problem, ranks=(64,) * 3, **vit_h)


def rivals(given: Problem) -> dict[str, Rival]:
    """Every product by itself, peft's layer with one pair for all columns, and the frozen product without terms."""

    def products(t: Tensors) -> list[Tensor]:
        y = F.linear(t["x"], t["weight"], t["bias"])
        parts = []
        for index, (start, stop, _) in enumerate(given.spans):
            low = F.linear(t["x"], t[f"a{index}"].to(y.dtype))
            parts.append((start, stop, _SCALE * F.linear(low, t[f"b{index}"].to(y.dtype))))
        for start, stop, part in parts:
            y = torch.cat((y[:, :start], y[:, start:stop] + part, y[:, stop:]), 1)
        return list(y.split(list(given.parts), dim=-1))

    def frozen(t: Tensors) -> list[Tensor]:
        return list(F.linear(t["x"], t["weight"], t["bias"]).split(list(given.parts), dim=-1))

    found = {"products": Rival(products)}
    if "x" in given.wanted:
        found["frozen"] = Rival(frozen, parameters=(), comparable=False, floor=True)
    if importlib.util.find_spec("peft") is not None:
        found["peft"] = _peft(given)
    return found


def _peft(given: Problem) -> Rival:
    """peft's layer as its users get it; the rank is that of one term, over all columns."""
    # Before transformers, which peft imports, looks for torchvision.
    import_timm()
    import peft

    weight, bias, rank = given.tensors["weight"], given.tensors["bias"], given.spans[0][2]
    layer = nn.Linear(*reversed(weight.shape), device="meta")
    layer.weight, layer.bias = (nn.Parameter(t, requires_grad=False) for t in (weight, bias))
    config = peft.LoraConfig(r=rank, lora_alpha=int(_SCALE * rank), target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(layer), config)
    trained = tuple(p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(0.0, 0.05)
    splits = list(given.parts)
    return Rival(lambda t: list(model(t["x"]).split(splits, dim=-1)), parameters=trained, comparable=False)
