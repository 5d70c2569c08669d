"""Attention over tokens and prompts: shapes, and torch's own kernels over concatenated keys and values."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.device_parts.operators import Cases, Rival
from bench.device_parts.problems import Problem, Tensors, Work, traffic
from bench.device_parts.rows import Unavailable
from fastpeft.ops.prompt_attention import Words, prompt_attention


def problem(
    dtype: torch.dtype,
    device: torch.device,
    *,
    batch: int = 3,
    heads: int = 4,
    tokens: int = 197,
    queries: int | None = None,
    prompts: int = 0,
    dim: int = 64,
    kind: str = "shared",
    apart: bool = False,
    causal: bool = False,
    mask: str | None = None,
    dropout: float = 0.0,
    masters: bool = False,
    wanted: Sequence[str] | None = None,
) -> Problem:
    """Draw a call.

    Args:
        dtype, device: of the inputs.
        batch, heads, tokens, prompts, dim: sizes.
        queries: rows of q; as many as tokens if None.
        kind: whose the prompts are: "shared", "sample" or "bank".
        apart: q, k and v in tensors of their own with heads before rows; otherwise slices of a projection's output.
        causal: token i sees tokens 0..i.
        mask: "bias" (one a sample and head), "holes" (shared, with -inf), "boolean", or None.
        dropout: on the attention weights, with words.
        masters: prompts in float32.
        wanted: whose gradients are asked for; everybody's if None.
    """
    queries = tokens if queries is None else queries

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    if apart:
        q, k, v = (draw(batch, heads, rows, dim) for rows in (queries, tokens, tokens))
    elif queries == tokens:
        q, k, v = draw(batch, tokens, 3, heads, dim).permute(2, 0, 3, 1, 4)
    else:
        q = draw(batch, queries, heads, dim).transpose(1, 2)
        k, v = draw(batch, tokens, 2, heads, dim).permute(2, 0, 3, 1, 4)
    tensors: dict[str, Tensor | None] = {"q": q, "k": k, "v": v}
    if prompts:
        group = {"shared": (), "sample": (batch,), "bank": (5,)}[kind]
        both = draw(*group, prompts, 2, heads, dim)
        both = both.float() if masters else both
        tensors["prompt_k"], tensors["prompt_v"] = (t.transpose(-3, -2) for t in both.unbind(-3))
        if kind == "bank":
            tensors["index"] = torch.randint(5, (batch,), device=device)
    if mask == "bias":
        tensors["mask"] = draw(batch, heads, queries, tokens)
    elif mask is not None:
        seen = torch.rand(queries, tokens, device=device) > 0.3
        holes = torch.zeros(queries, tokens, device=device).masked_fill_(~seen, float("-inf")).to(dtype)
        tensors["mask"] = seen if mask == "boolean" else holes
    if dropout:
        word = functools.partial(torch.randint, -(1 << 31), 1 << 31, dtype=torch.int32, device=device)
        tensors |= {"rows": word((batch, heads, queries)), "columns": word((tokens + prompts,))}

    def call(t: Tensors, backend: str) -> tuple[Tensor]:
        words = Words(t["rows"], t["columns"]) if dropout else None
        # Kernels convert prompts of another format themselves; torch's function takes one format.
        prompts = [t.get(name) for name in ("prompt_k", "prompt_v")]
        if masters and backend == "reference":
            prompts = [prompt.to(t["q"].dtype) for prompt in prompts]
        out = prompt_attention(
            t["q"],
            t["k"],
            t["v"],
            *prompts,
            attn_mask=t.get("mask"),
            causal=causal,
            dropout=dropout,
            words=words,
            prompt_index=t.get("index"),
            backend=backend,
        )
        return (out,)

    trained = tuple(name for name in ("q", "k", "v", "prompt_k", "prompt_v") if name in tensors)
    wanted = trained if wanted is None else tuple(wanted)
    product = 2 * batch * heads * queries * (tokens + prompts) * dim
    given = traffic(*(tensors[name] for name in trained))
    sums = 4 * batch * heads * queries
    work = Work(
        # q k^T and P v; backward P and dP again or for the first time, dv, dq and dk.
        forward_flops=2 * product,
        backward_flops=5 * product,
        forward_bytes=given + traffic(q) + sums,
        backward_bytes=given + 2 * traffic(q) + sums + traffic(*(tensors[name] for name in wanted)),
    )
    return Problem(tensors, wanted, ("out",), call, work)


def checked(tiny: bool) -> Cases:
    """What has to be right: lengths, prompts, head widths, masks and layouts."""
    if tiny:
        yield "N=17 p=0", functools.partial(problem, batch=2, heads=2, tokens=17, dim=32)
        yield "N=1 p=5", functools.partial(problem, batch=2, heads=2, tokens=1, prompts=5, dim=32)
        sizes = {"batch": 2, "heads": 2, "tokens": 17, "prompts": 3, "dim": 32}
        for kind in ("sample", "bank"):
            yield f"N=17 p=3 {kind}", functools.partial(problem, kind=kind, **sizes)
        yield "N=17 p=3 causal, dropout", functools.partial(problem, causal=True, dropout=0.2, **sizes)
        yield "N=17 p=3 bias", functools.partial(problem, mask="bias", **sizes)
        return
    for tokens, prompts in itertools.product((1, 197, 257, 577), (0, 1, 5, 50, 200)):
        # A single row gives too few numbers to compare rounding errors by.
        sizes = {"tokens": tokens, "prompts": prompts, "batch": 8 if tokens == 1 else 3, "heads": 12}
        yield f"N={tokens} p={prompts}", functools.partial(problem, **sizes)
    for kind, prompts in itertools.product(("sample", "bank"), (1, 5, 50, 200)):
        yield f"N=197 p={prompts} {kind}", functools.partial(problem, prompts=prompts, kind=kind, batch=5)
    for dim, prompts in itertools.product((32, 80, 96, 128), (0, 5, 200)):
        yield f"N=257 p={prompts} D={dim}", functools.partial(problem, tokens=257, prompts=prompts, dim=dim)
    features = {
        "N=77 p=0 causal": {"tokens": 77, "causal": True},
        "N=77 p=50 causal": {"tokens": 77, "prompts": 50, "causal": True},
        "N=197 p=50 bias": {"prompts": 50, "mask": "bias"},
        "N=197 p=0 bias": {"mask": "bias"},
        "N=197 p=5 shared mask with holes": {"prompts": 5, "mask": "holes"},
        "N=197 p=5 boolean mask": {"prompts": 5, "mask": "boolean"},
        "N=197 p=0 dropout": {"dropout": 0.1},
        "N=197 p=50 dropout": {"prompts": 50, "dropout": 0.1},
        "N=197 p=50 sample, dropout": {"prompts": 50, "kind": "sample", "dropout": 0.5},
        "N=197 p=5 causal, dropout": {"prompts": 5, "causal": True, "dropout": 0.1},
        "Nq=1 N=197 p=10": {"queries": 1, "prompts": 10, "batch": 8},
        "Nq=50 N=197 p=5": {"queries": 50, "prompts": 5},
        "Nq=77 N=257 p=0 D=80": {"queries": 77, "tokens": 257, "dim": 80},
        "N=197 p=50 heads first": {"prompts": 50, "apart": True},
        "N=197 p=50 fp32 prompts": {"prompts": 50, "masters": True},
        "N=197 p=200 prompts' gradients alone": {"prompts": 200, "wanted": ("prompt_k", "prompt_v")},
        "N=197 p=0 queries' gradient alone": {"wanted": ("q",)},
        "N=785 p=200": {"tokens": 785, "prompts": 200, "batch": 2},
        "N=197 p=200 one sample": {"prompts": 200, "batch": 1, "heads": 12},
    }
    for name, options in features.items():
        yield name, functools.partial(problem, **options)


def timed(tiny: bool) -> Cases:
    """Training steps' shapes, batch 64."""
    if tiny:
        yield "N=17 p=3", functools.partial(problem, batch=2, heads=2, tokens=17, prompts=3, dim=32)
        return
    vit_b = {"batch": 64, "heads": 12, "tokens": 197}
    vit_h = {"batch": 64, "heads": 16, "tokens": 257, "dim": 80}
    yield "ViT-B/16 p=200", functools.partial(problem, prompts=200, **vit_b)
    yield "ViT-B/16 p=200 a sample", functools.partial(problem, prompts=200, kind="sample", **vit_b)
    yield "ViT-B/16 p=0", functools.partial(problem, **vit_b)
    yield "ViT-B/16 p=1", functools.partial(problem, prompts=1, **vit_b)
    yield "ViT-B/16 p=50", functools.partial(problem, prompts=50, **vit_b)
    yield "ViT-H/14 p=200", functools.partial(problem, prompts=200, **vit_h)
    yield "ViT-H/14 p=0", functools.partial(problem, **vit_h)
    yield "ViT-B/16 384 px p=50", functools.partial(problem, batch=32, heads=12, tokens=577, prompts=50)
    yield "ViT-B/16 p=200, class token's query", functools.partial(problem, queries=1, prompts=200, **vit_b)


def rivals(given: Problem) -> dict[str, Rival]:
    """Torch's attention over concatenated keys and values, by each of its kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def concatenated(t: Tensors) -> tuple[Tensor]:
        k, v = t["k"], t["v"]
        if "prompt_k" in t:
            k, v = (torch.cat((x, t[p].expand(len(x), -1, -1, -1)), 2) for x, p in ((k, "prompt_k"), (v, "prompt_v")))
        return (F.scaled_dot_product_attention(t["q"], k, v),)

    def on(kernel: SDPBackend, t: Tensors) -> tuple[Tensor]:
        try:
            with sdpa_kernel(kernel):
                return concatenated(t)
        except RuntimeError as error:
            if "No viable backend" in str(error) or "No available kernel" in str(error):
                raise Unavailable(f"torch: {error}") from None
            raise

    kernels = {
        "sdpa-flash": SDPBackend.FLASH_ATTENTION,
        "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    return {name: Rival(functools.partial(on, kernel)) for name, kernel in kernels.items()}
