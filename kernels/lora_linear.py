"""A frozen linear layer with low-rank terms beside it.

    y = x W^T + b,      y[:, s_t:e_t] += scale_t h_t B_t^T,      h_t = x A_t^T               for every term t
    dx = dy W + sum_t g_t A_t,                                   g_t = scale_t dy[:, s_t:e_t] B_t
    dA_t = g_t^T x,     dB_t = scale_t dy[:, s_t:e_t]^T h_t

Two variants compute the same. "fused": one kernel multiplies by W and adds the terms before it stores; forward, only
tiles that lie in a term's columns pay for it. "beside": the vendor's library multiplies by W, and one kernel adds the
terms in place. The factors' gradients are sums over rows, split among programs and added in a fixed order.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastpeft.kernels._compile import SHARED_LIMIT
from fastpeft.kernels._launch import capability_of, launch, processors_of
from fastpeft.kernels._lora_linear_beside import (
    lora_linear_backward_beside,
    lora_linear_factors,
    lora_linear_forward_beside,
)
from fastpeft.kernels._lora_linear_fused import lora_linear_backward_fused, lora_linear_forward_fused
from fastpeft.kernels._matmul import (
    Tiles,
    aligned,
    choose_tiles,
    on_matrix_units,
    precision,
    tile_candidates,
    type_reasons,
)
from fastpeft.kernels._tune import rounded, tuned

# a (r, K), b (stop - start, r), scale, start, stop.
Term = tuple[Tensor, Tensor, float, int, int]

VARIANTS = ("fused", "beside")
MOST_TERMS = 4
MOST_RANK = 64

# By compute capability. Nothing has been measured on a chip yet, so the large product stays with the vendor's library.
_DEFAULT_VARIANT = {75: "beside", 80: "beside", 90: "beside", 100: "beside"}


def reasons(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[Term]) -> list[str]:
    """Why the kernels cannot take these arguments of `forward`; empty if they can."""
    found = type_reasons(x.dtype, capability_of(x.device))
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        return [*found, f"x {tuple(x.shape)} and weight {tuple(weight.shape)} are not (M, K) and (N, K)"]
    if weight.dtype != x.dtype:
        found.append(f"the weight is {weight.dtype}, x is {x.dtype}")
    if x.stride(1) != 1 or weight.stride(1) != 1:
        found.append("x and weight need elements of a row side by side")
    if bias is not None and bias.shape != weight.shape[:1]:
        found.append(f"the bias {tuple(bias.shape)} is not ({weight.shape[0]},)")
    if not 1 <= len(terms) <= MOST_TERMS:
        return [*found, f"{len(terms)} low-rank terms, the kernels take 1 to {MOST_TERMS}"]
    found += [reason for index, term in enumerate(terms) for reason in _term_reasons(index, term, x, weight)]
    if len({factor.dtype for a, b, *_ in terms for factor in (a, b)}) > 1:
        found.append("the factors are of different types")
    ordered = sorted((term[3], term[4]) for term in terms)
    if any(stop > start for (_, stop), (start, _) in itertools.pairwise(ordered)):
        found.append("columns of two terms overlap")
    return found


def _term_reasons(index: int, term: Term, x: Tensor, weight: Tensor) -> list[str]:
    if any(extra is not None for extra in term[5:]):
        return [f"term {index} has dropout or a bias of its own"]
    a, b, _, start, stop = term[:5]
    found = []
    rank, columns = a.shape[0], weight.shape[0]
    if a.shape != (rank, weight.shape[1]) or b.shape != (stop - start, rank) or not 0 <= start < stop <= columns:
        return [
            f"term {index}: A {tuple(a.shape)} and B {tuple(b.shape)} do not fit columns {start} to {stop} "
            f"of a {tuple(weight.shape)} weight"
        ]
    if not 1 <= rank <= MOST_RANK:
        found.append(f"term {index} has rank {rank}, the kernels take 1 to {MOST_RANK}")
    if any(factor.dtype not in (x.dtype, torch.float32) for factor in (a, b)):
        found.append(f"term {index}: the factors are {a.dtype} and {b.dtype}, expected {x.dtype} or float32")
    if not a.is_contiguous() or not b.is_contiguous():
        found.append(f"term {index}: the factors are not contiguous")
    if any(border % 16 for border in (start, stop) if border != columns):
        found.append(f"term {index}: columns {start} to {stop} do not begin and end at a multiple of 16")
    return found


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[Term], *, variant: str | None = None
) -> tuple[Tensor, Tensor]:
    """Apply the layer.

    Args:
        x: (M, K), last stride 1.
        weight: (N, K), last stride 1, in x's dtype.
        bias: (N,) or None.
        terms: (a, b, scale, start, stop) each; a (r, K) and b (stop - start, r), contiguous, in x's dtype or all fp32.
        variant: "fused" or "beside"; None for the chip's default.

    Returns:
        y (M, N), and h (M, sum of r), x A^T of all terms side by side, which `backward` needs; both in x's dtype.

    Raises:
        ValueError: `reasons` is not empty, or there is no such variant.
    """
    refused = reasons(x, weight, bias, terms)
    if refused:
        raise ValueError(f"lora_linear cannot run: {'; '.join(refused)}")
    variant = _variant(variant, x)
    rows, (columns, inner) = x.shape[0], weight.shape
    y = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    h = torch.empty((rows, sum(term[0].shape[0] for term in terms)), dtype=x.dtype, device=x.device)
    capability, processors = capability_of(x.device), processors_of(x.device)
    shared = _term_arguments(terms)
    if variant == "fused":
        everywhere = _everywhere(terms, columns)
        widest = 256 if everywhere else _border_block(terms, columns)
        low = (_rank_block(terms), terms[0][0].dtype.itemsize)
        whole = aligned(x, weight)
        table = choose_tiles(rows, columns, x.dtype, capability, processors, whole, widest, low)

        def run(tiles: Tiles) -> tuple[Tensor, Tensor]:
            arguments = dict(
                x_ptr=x, weight_ptr=weight, bias_ptr=bias, y_ptr=y, h_ptr=h, **shared,
                M=rows, N=columns, K=inner, x_row=x.stride(0), weight_row=weight.stride(0),
                RANKS=h.shape[1], EVERYWHERE=everywhere,
                BLOCK_M=tiles.m, BLOCK_N=tiles.n, BLOCK_K=tiles.k, BLOCK_R=low[0],
                EVEN=inner % tiles.k == 0, PRECISION=precision(x.dtype),
            )  # fmt: skip
            grid = (triton.cdiv(rows, tiles.m) * triton.cdiv(columns, tiles.n),)
            launch(lora_linear_forward_fused, grid, arguments, tiles.warps, tiles.stages)
            return y, h

        key = _key(x, columns, terms, whole) | {"bias": None if bias is None else bias.dtype}
        others = functools.partial(tile_candidates, table, x.dtype, capability, whole, widest, low)
        return tuned(lora_linear_forward_fused, x.device, key, table, others, run)
    # With `out`, neither autocast nor autograd touches the product.
    if bias is None:
        torch.mm(x, weight.t(), out=y)
    else:
        torch.addmm(bias.to(x.dtype), x, weight.t(), out=y)
    widest = max(stop - start for *_, start, stop in terms)

    def run_beside(tiles: Tiles, y: Tensor) -> tuple[Tensor, Tensor]:
        arguments = dict(
            x_ptr=x, y_ptr=y, h_ptr=h, **shared,
            M=rows, K=inner, x_row=x.stride(0), y_row=columns, RANKS=h.shape[1],
            BLOCK_M=tiles.m, BLOCK_N=tiles.n, BLOCK_K=tiles.k, BLOCK_R=_rank_block(terms),
            PRECISION=precision(x.dtype),
        )  # fmt: skip
        grid = _beside_grid(rows, widest, tiles.m, tiles.n, processors)
        launch(lora_linear_forward_beside, grid, arguments, tiles.warps, tiles.stages)
        return y, h

    whole = aligned(x)
    table = _beside_tiles(x.dtype, capability, whole, terms)
    others = functools.partial(_beside_candidates, table, x.dtype, capability, whole, terms)
    key = _key(x, columns, terms, whole)
    return tuned(lora_linear_forward_beside, x.device, key, table, others, run_beside, (y,))


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    terms: Sequence[Term],
    h: Tensor,
    *,
    needs_x: bool = True,
    needs_factors: bool = True,
    variant: str | None = None,
) -> tuple[Tensor | None, list[tuple[Tensor, Tensor]] | None]:
    """Gradients of the input and of the factors; nothing is computed for the weight or the bias.

    Args:
        dy: (M, N), in x's dtype.
        x: as given to `forward`.
        weight: as given to `forward`.
        terms: as given to `forward`.
        h: from `forward`.
        needs_x: whether dx is asked for.
        needs_factors: whether dA and dB are.
        variant: of dx; "fused" or "beside", None for the chip's default.

    Returns:
        dx (M, K) in x's dtype, or None; (dA, dB) of each term in its factors' dtypes, or None. The factors' gradients
        are views of one buffer where that is fp32.

    Raises:
        ValueError: there is no such variant.
    """
    variant = _variant(variant, x)
    if not needs_x and not needs_factors:
        return None, None
    if dy.stride(1) != 1:
        dy = dy.contiguous()
    rows, (columns, inner) = x.shape[0], weight.shape
    dx = torch.empty((rows, inner), dtype=x.dtype, device=x.device) if needs_x else None
    g = torch.empty_like(h) if needs_factors else None
    capability, processors = capability_of(x.device), processors_of(x.device)
    shared = _term_arguments(terms)
    if needs_x and variant == "fused":
        everywhere = _everywhere(terms, columns)
        low = (_rank_block(terms), terms[0][0].dtype.itemsize)
        whole = aligned(dy, weight)
        table = choose_tiles(rows, inner, x.dtype, capability, processors, whole, low=low)
        borders = (columns, *(border for *_, start, stop in terms for border in (start, stop)))

        def run(tiles: Tiles) -> tuple[Tensor | None, ...]:
            arguments = dict(
                dy_ptr=dy, weight_ptr=weight, dx_ptr=dx, g_ptr=g, **shared,
                M=rows, N=columns, K=inner, dy_row=dy.stride(0), weight_row=weight.stride(0),
                RANKS=h.shape[1], KEEP=needs_factors, EVERYWHERE=everywhere,
                BLOCK_M=tiles.m, BLOCK_N=tiles.n, BLOCK_K=tiles.k, BLOCK_R=low[0],
                EVEN=math.gcd(*borders) % tiles.k == 0, PRECISION=precision(x.dtype),
            )  # fmt: skip
            grid = (triton.cdiv(rows, tiles.m) * triton.cdiv(inner, tiles.n),)
            launch(lora_linear_backward_fused, grid, arguments, tiles.warps, tiles.stages)
            return dx, g

        others = functools.partial(tile_candidates, table, x.dtype, capability, whole, low=low)
        key = _key(x, columns, terms, whole) | {"keep": needs_factors}
        tuned(lora_linear_backward_fused, x.device, key, table, others, run)
    else:
        if needs_x:
            torch.mm(dy, weight, out=dx)

        def run_beside(tiles: Tiles, *dx: Tensor) -> tuple[Tensor | None, ...]:
            arguments = dict(
                dy_ptr=dy, dx_ptr=dx[0] if dx else None, g_ptr=g, **shared, M=rows, K=inner, dy_row=dy.stride(0),
                RANKS=h.shape[1], ADD=needs_x, KEEP=needs_factors,
                BLOCK_M=tiles.m, BLOCK_N=tiles.n, BLOCK_K=tiles.k, BLOCK_R=_rank_block(terms),
                PRECISION=precision(x.dtype),
            )  # fmt: skip
            grid = _beside_grid(rows, inner if needs_x else 1, tiles.m, tiles.n, processors)
            launch(lora_linear_backward_beside, grid, arguments, tiles.warps, tiles.stages)
            return *dx, g

        whole = aligned(dy, x)
        table = _beside_tiles(x.dtype, capability, whole, terms)
        others = functools.partial(_beside_candidates, table, x.dtype, capability, whole, terms)
        key = _key(x, columns, terms, whole) | {"add": needs_x, "keep": needs_factors}
        tuned(lora_linear_backward_beside, x.device, key, table, others, run_beside, (dx,) if needs_x else ())
    return dx, _factor_gradients(dy, x, terms, h, g) if needs_factors else None


def _factor_gradients(
    dy: Tensor, x: Tensor, terms: Sequence[Term], h: Tensor, g: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """dA = g^T x and dB = scale dy^T h from one kernel that reads each column of x and of the terms' dy once."""
    rows, inner = x.shape
    ranks = h.shape[1]
    together = ranks <= MOST_RANK
    whole = aligned(x, dy)

    def run(tiles: _SumTiles) -> Tensor:
        shared = _term_arguments(terms, factors=False)
        tile = triton.cdiv(inner, tiles.c) * (1 if together else len(terms))
        for place, index in enumerate(order):
            start, stop = terms[index][3:5]
            shared[f"base{place}"], shared[f"tile{place}"] = bases[index], tile
            tile += triton.cdiv(stop - start, tiles.c)
        for place in range(len(terms), MOST_TERMS):
            shared[f"base{place}"] = shared[f"tile{place}"] = None
        blocks = max(1, triton.cdiv(rows, tiles.m))
        split_rows = triton.cdiv(blocks, min(blocks, triton.cdiv(2 * processors_of(x.device), tile))) * tiles.m
        splits = max(1, triton.cdiv(rows, split_rows))
        sums = torch.empty((splits, total), dtype=torch.float32, device=x.device)
        arguments = dict(
            x_ptr=x, dy_ptr=dy, h_ptr=h, g_ptr=g, sums_ptr=sums, **shared,
            M=rows, K=inner, x_row=x.stride(0), dy_row=dy.stride(0), total=total, split_rows=split_rows,
            RANKS=ranks, TOGETHER=together, BLOCK_M=tiles.m, BLOCK_C=tiles.c,
            BLOCK_R=max(16, triton.next_power_of_2(ranks)) if together else _rank_block(terms),
            PRECISION=precision(x.dtype),
        )  # fmt: skip
        launch(lora_linear_factors, (tile, splits), arguments, tiles.warps, tiles.stages)
        return sums[0] if splits == 1 else torch.sum(sums, 0)

    order, bases, total = _order(terms), {}, ranks * inner
    for index in order:
        a, _, _, start, stop = terms[index][:5]
        bases[index] = total
        total += (stop - start) * a.shape[0]
    capability = capability_of(x.device)
    table = _sum_tiles(x.dtype, capability, whole)
    others = functools.partial(_sum_candidates, x.dtype, capability, whole)
    flat = tuned(lora_linear_factors, x.device, _key(x, dy.shape[1], terms, whole), table, others, run)
    found, column = [], 0
    for index, term in enumerate(terms):
        a, b = term[:2]
        da = flat[column * inner : (column + a.shape[0]) * inner].view(a.shape)
        db = flat[bases[index] : bases[index] + b.numel()].view(b.shape)
        found.append((da.to(a.dtype), db.to(b.dtype)))
        column += a.shape[0]
    return found


def _variant(variant: str | None, x: Tensor) -> str:
    if variant is None:
        return _DEFAULT_VARIANT.get(capability_of(x.device), "beside")
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}, expected one of {', '.join(VARIANTS)}")
    return variant


def _order(terms: Sequence[Term]) -> list[int]:
    """Indices of the terms by their columns, in which the kernels go through them."""
    return sorted(range(len(terms)), key=lambda index: terms[index][3])


def _term_arguments(terms: Sequence[Term], factors: bool = True) -> dict[str, Any]:
    """What the kernels are told of each term; the terms that there could be but are not have rank 0."""
    columns = [sum(term[0].shape[0] for term in terms[:index]) for index in range(len(terms))]
    arguments: dict[str, Any] = {}
    order = _order(terms)
    for place in range(MOST_TERMS):
        a, b, scale, start, stop = terms[order[place]][:5] if place < len(order) else (None,) * 5
        if factors:
            arguments |= {f"a{place}_ptr": a, f"b{place}_ptr": b}
        arguments |= {
            f"scale{place}": None if scale is None else float(scale),
            f"start{place}": start,
            f"stop{place}": stop,
            f"RANK{place}": 0 if a is None else a.shape[0],
            f"COLUMN{place}": 0 if a is None else columns[order[place]],
        }
    return arguments


def _everywhere(terms: Sequence[Term], columns: int) -> bool:
    return len(terms) == 1 and (terms[0][3], terms[0][4]) == (0, columns)


def _border_block(terms: Sequence[Term], columns: int) -> int:
    """Largest tile width at whose multiples every term begins and ends, or ends with the output."""
    borders = [border for term in terms for border in (term[3], term[4]) if border != columns]
    return next(block for block in (256, 128, 64, 32, 16) if all(border % block == 0 for border in borders))


def _rank_block(terms: Sequence[Term]) -> int:
    """Columns of the narrow product in a kernel: matrix instructions want at least 16."""
    return max(16, *(triton.next_power_of_2(term[0].shape[0]) for term in terms))


def _key(x: Tensor, columns: int, terms: Sequence[Term], whole: bool) -> dict[str, object]:
    """Class of a launch."""
    return {
        "rows": rounded(x.shape[0]),
        "inner": x.shape[1],
        "columns": columns,
        "dtype": x.dtype,
        "precision": precision(x.dtype),
        "factors": terms[0][0].dtype,
        "terms": ",".join(f"{start}:{stop}r{a.shape[0]}" for a, _, _, start, stop in (term[:5] for term in terms)),
        "aligned": whole,
    }


def _beside_tiles(dtype: torch.dtype, capability: int, whole: bool, terms: Sequence[Term]) -> Tiles:
    """Rows, output columns, reduction step, warps and stages of the kernels that add terms in place."""
    rank = _rank_block(terms)
    if not on_matrix_units(dtype, capability):
        return Tiles(32, 64 if rank == 16 else 32, 16, 4, 2)
    if not whole:
        return Tiles(64, 64, 32, 4, 2)
    if rank * len(terms) > 128:
        # The narrow sums of all terms are alive together; matrix units that read shared memory want 64 rows.
        group = capability in (90, 100) and dtype.itemsize == 2
        return Tiles(64, 64, 32, 8, 2) if group else Tiles(32, 64, 32, 4, 2)
    return Tiles(64, 64, 128 // dtype.itemsize, 8 if capability == 100 else 4, 3)


def _beside_candidates(
    table: Tiles, dtype: torch.dtype, capability: int, whole: bool, terms: Sequence[Term]
) -> list[Tiles]:
    """Tiles that may be faster than the table's; none where elements are loaded one by one or multiplied so."""
    if not on_matrix_units(dtype, capability) or not whole:
        return []
    m, n, k, warps = table.m, table.n, table.k, table.warps
    # What is left out on single chips spills there, here and in the sums.
    found = [Tiles(m, n, k, warps, table.stages + 1)] if capability != 100 or table.stages < 3 else []
    if _rank_block(terms) * len(terms) <= 128:
        found += [Tiles(64, 128, k, 8, 3), Tiles(128, 64, k, 8, 3), Tiles(64, 32, k, warps, 3)]
        found += [Tiles(64, 64, k, 8, 3)] if warps == 4 else []
    factor = _rank_block(terms) * terms[0][0].dtype.itemsize
    limit = SHARED_LIMIT.get(capability, SHARED_LIMIT[75]) - 4096
    return [t for t in found if t.stages * (t.k * (t.m * dtype.itemsize + factor) + t.n * factor) <= limit]


def _beside_grid(rows: int, columns: int, block_m: int, block_n: int, processors: int) -> tuple[int, int]:
    """Row blocks, and among how many programs the columns of one are divided where there are few."""
    blocks = triton.cdiv(rows, block_m)
    parts = min(triton.cdiv(columns, block_n), processors // max(1, blocks))
    return blocks, max(1, parts)


class _SumTiles(NamedTuple):
    """Rows a step, columns, warps and stages of the sums over rows."""

    m: int
    c: int
    warps: int
    stages: int


def _sum_tiles(dtype: torch.dtype, capability: int, whole: bool) -> _SumTiles:
    """The table's choice."""
    if not on_matrix_units(dtype, capability):
        return _SumTiles(16, 64, 4, 2)
    if not whole:
        return _SumTiles(32, 64, 4, 2)
    return _SumTiles(128 // dtype.itemsize, 64, 4, 3)


def _sum_candidates(dtype: torch.dtype, capability: int, whole: bool) -> list[_SumTiles]:
    """Tiles that may be faster: at most 96 KiB, which all chips with matrix instructions have."""
    if not on_matrix_units(dtype, capability) or not whole:
        return []
    m = 128 // dtype.itemsize
    found = [_SumTiles(m, 64, 4, 4), _SumTiles(m // 2, 64, 4, 4), _SumTiles(2 * m, 64, 8, 2)]
    return [*found, _SumTiles(m, 128, 8, 3)] if capability in (90, 100) else found
