"""The two products of a frozen MLP that an activation stands beside, each with the activation as its epilogue.

    z = x W1^T + b1,    a = act(z)          dz = (dy W2) * act'(z)

The backward pass needs act'(z), for which the forward pass keeps z in x's dtype ("preactivation"), act'(z) in 8 bits
("derivative8"), or nothing, where the caller computes z again. The 8 bits are steps from the derivative's smallest to
its largest value, so that dz is off by at most half a step times |dy W2|.

Two variants compute the same. "fused": one kernel multiplies and applies the epilogue before it stores. "beside": the
vendor's library multiplies, and an elementwise kernel follows.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpeft.kernels._activation import CODES, activate, derivative
from fastpeft.kernels._launch import capability_of, launch, processors_of
from fastpeft.kernels._matmul import (
    Tiles,
    aligned,
    choose_tiles,
    grouped,
    precision,
    product,
    tile_candidates,
    type_reasons,
)
from fastpeft.kernels._tune import rounded, tuned

VARIANTS = ("fused", "beside")
KEEP = ("preactivation", "derivative8", "nothing")

# Smallest and largest derivative of each activation, rounded outwards.
DERIVATIVE_RANGES = {
    "identity": (0.0, 1.0),
    "relu": (0.0, 1.0),
    "gelu": (-0.1289042, 1.1289042),
    "gelu_tanh": (-0.1289931, 1.1289931),
    "quick_gelu": (-0.0998394, 1.0998394),
    "silu": (-0.0998394, 1.0998394),
}

# By compute capability. Nothing has been measured on a chip yet, so the products stay with the vendor's library.
_DEFAULT_VARIANT = {75: "beside", 80: "beside", 90: "beside", 100: "beside"}

# Columns of a tile: an activation and its derivative want as many registers again as the tile itself.
_WIDEST = 128

# What `kept` holds, as the kernels are told.
_NOTHING, _PREACTIVATION, _DERIVATIVE8 = 0, 1, 2
_FORMS = {"nothing": _NOTHING, "preactivation": _PREACTIVATION, "derivative8": _DERIVATIVE8}


def derivative_step(activation: str) -> float:
    """Distance of neighbouring values of an activation's 8-bit derivative; it is off by at most half of this."""
    lowest, highest = DERIVATIVE_RANGES[activation]
    return (highest - lowest) / 255


@triton.jit
def _quantised(slope, LOWEST: tl.constexpr, STEP: tl.constexpr):
    """Number of the step nearest to a derivative."""
    return tl.minimum(tl.maximum(tl.floor((slope - LOWEST) * (1.0 / STEP) + 0.5), 0.0), 255.0).to(tl.uint8)


@triton.jit
def _slope(kept, FORM: tl.constexpr, CODE: tl.constexpr, LOWEST: tl.constexpr, STEP: tl.constexpr):
    """act'(z) in fp32 from what was kept."""
    if FORM == 2:
        return kept.to(tl.float32) * STEP + LOWEST
    else:
        return derivative(kept.to(tl.float32), CODE)


@triton.jit
def mlp_forward_fused(
    x_ptr,  # (M, K), row stride x_row
    weight_ptr,  # (N, K), row stride weight_row
    bias_ptr,  # (N,) or None
    a_ptr,  # (M, N)
    kept_ptr,  # (M, N), x's type or uint8; None if FORM is 0
    M,
    N,
    K,
    x_row,
    weight_row,
    CODE: tl.constexpr,
    FORM: tl.constexpr,  # 0: keep nothing, 1: z, 2: act'(z) in 8 bits
    LOWEST: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,  # K is a multiple of BLOCK_K
    PRECISION: tl.constexpr,
):
    """One tile of a."""
    tile_m, tile_n = grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), 8)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = rows < M, columns < N
    z = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    z, _ = product(
        z, z, x_ptr, x_row, rows, row_mask, weight_ptr, 1, weight_row, columns, column_mask,
        None, 0, 0, 0, 0, K, False, BLOCK_K, 16, EVEN, PRECISION,
    )  # fmt: skip
    if bias_ptr is not None:
        z += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    place = rows[:, None] * N + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    if FORM == 1:
        tl.store(kept_ptr + place, z.to(kept_ptr.dtype.element_ty), mask=mask)
    if FORM == 2:
        tl.store(kept_ptr + place, _quantised(derivative(z, CODE), LOWEST, STEP), mask=mask)
    tl.store(a_ptr + place, activate(z, CODE).to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit
def mlp_activate(
    z_ptr,  # (M, N), contiguous
    bias_ptr,  # (N,), still to be added, or None
    a_ptr,  # (M, N), contiguous; may be z itself
    kept_ptr,  # (M, N), contiguous: z itself where the bias must be added to it, uint8, or None
    M,
    N,
    CODE: tl.constexpr,
    FORM: tl.constexpr,  # 0: store nothing besides a, 1: z, 2: act'(z) in 8 bits
    LOWEST: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of a, and of what is kept, from a tile of z."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < N
    place = rows[:, None] * N + columns[None, :]
    mask = (rows < M)[:, None] & column_mask[None, :]
    z = tl.load(z_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if FORM == 1:
        tl.store(kept_ptr + place, z.to(kept_ptr.dtype.element_ty), mask=mask)
    if FORM == 2:
        tl.store(kept_ptr + place, _quantised(derivative(z, CODE), LOWEST, STEP), mask=mask)
    tl.store(a_ptr + place, activate(z, CODE).to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit
def mlp_backward_fused(
    dy_ptr,  # (M, N), row stride dy_row
    weight_ptr,  # (N, K), row stride weight_row
    kept_ptr,  # (M, K), contiguous
    dz_ptr,  # (M, K)
    M,
    N,
    K,
    dy_row,
    weight_row,
    CODE: tl.constexpr,
    FORM: tl.constexpr,  # 1: kept is z, 2: act'(z) in 8 bits
    LOWEST: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # columns of dz
    BLOCK_K: tl.constexpr,  # of the sum over dy's columns
    EVEN: tl.constexpr,  # N is a multiple of BLOCK_K
    PRECISION: tl.constexpr,
):
    """One tile of dz."""
    tile_m, tile_n = grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N), 8)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = rows < M, columns < K
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc, _ = product(
        acc, acc, dy_ptr, dy_row, rows, row_mask, weight_ptr, weight_row, 1, columns, column_mask,
        None, 0, 0, 0, 0, N, False, BLOCK_K, 16, EVEN, PRECISION,
    )  # fmt: skip
    place = rows[:, None] * K + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    kept = tl.load(kept_ptr + place, mask=mask, other=0)
    acc *= _slope(kept, FORM, CODE, LOWEST, STEP)
    tl.store(dz_ptr + place, acc.to(dz_ptr.dtype.element_ty), mask=mask)


@triton.jit
def mlp_differentiate(
    dz_ptr,  # (M, K), contiguous; holds dy W2, changed in place
    kept_ptr,  # (M, K), contiguous
    count,  # M * K
    CODE: tl.constexpr,
    FORM: tl.constexpr,  # 1: kept is z, 2: act'(z) in 8 bits
    LOWEST: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Elements of dz times the derivative."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < count
    dz = tl.load(dz_ptr + place, mask=mask, other=0.0).to(tl.float32)
    kept = tl.load(kept_ptr + place, mask=mask, other=0)
    dz *= _slope(kept, FORM, CODE, LOWEST, STEP)
    tl.store(dz_ptr + place, dz.to(dz_ptr.dtype.element_ty), mask=mask)


def reasons(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, *, keep: str = "preactivation"
) -> list[str]:
    """Why the kernels cannot take these arguments of `forward`; empty if they can."""
    found = _common_reasons(x, weight, activation, keep)
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        return [*found, f"x {tuple(x.shape)} and weight {tuple(weight.shape)} are not (M, K) and (N, K)"]
    if bias is not None and bias.shape != weight.shape[:1]:
        found.append(f"the bias {tuple(bias.shape)} is not ({weight.shape[0]},)")
    if bias is not None and bias.dtype not in (x.dtype, torch.float32):
        found.append(f"the bias is {bias.dtype}, expected {x.dtype} or float32")
    return found


def backward_reasons(dy: Tensor, weight2: Tensor, kept: Tensor, activation: str, *, keep: str) -> list[str]:
    """Why the kernels cannot take these arguments of `backward_input`; empty if they can."""
    found = _common_reasons(dy, weight2, activation, keep)
    if dy.dim() != 2 or weight2.dim() != 2 or dy.shape[1] != weight2.shape[0]:
        return [*found, f"dy {tuple(dy.shape)} and weight {tuple(weight2.shape)} are not (M, N) and (N, K)"]
    expected = (dy.shape[0], weight2.shape[1])
    if kept.shape != expected or not kept.is_contiguous():
        found.append(f"what was kept {tuple(kept.shape)} is not {expected} and contiguous")
    expected_type = torch.uint8 if keep == "derivative8" else dy.dtype
    if kept.dtype != expected_type:
        found.append(f"what was kept is {kept.dtype}, expected {expected_type}")
    return found


def _common_reasons(x: Tensor, weight: Tensor, activation: str, keep: str) -> list[str]:
    found = type_reasons(x.dtype, capability_of(x.device))
    if activation not in CODES:
        found.append(f"activation {activation!r} is not one of {', '.join(CODES)}")
    if keep not in KEEP:
        found.append(f"keep={keep!r} is not one of {', '.join(KEEP)}")
    if keep == "derivative8" and x.dtype == torch.float32:
        found.append("8 bits of a derivative are too few for float32")
    if weight.dtype != x.dtype:
        found.append(f"the weight is {weight.dtype}, the input {x.dtype}")
    if x.stride(-1) != 1 or weight.stride(-1) != 1:
        found.append("input and weight need elements of a row side by side")
    return found


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    *,
    keep: str = "preactivation",
    variant: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The first layer and the activation.

    Args:
        x: (M, K), last stride 1.
        weight: (N, K), last stride 1, in x's dtype.
        bias: (N,), in x's dtype or fp32, or None.
        activation: a name in `_activation.CODES`.
        keep: what `backward_input` will be given: "preactivation", "derivative8" (not for fp32) or "nothing".
        variant: "fused" or "beside"; None for the chip's default.

    Returns:
        a (M, N) in x's dtype, and what is kept, (M, N): z in x's dtype, uint8, or None.

    Raises:
        ValueError: `reasons` is not empty, or there is no such variant.
    """
    _refuse(reasons(x, weight, bias, activation, keep=keep))
    variant = _variant(variant, x)
    rows, (columns, inner) = x.shape[0], weight.shape
    a = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    form = _FORMS[keep]
    constants = _constants(activation, form)
    if variant == "fused":
        kept = None if form == _NOTHING else torch.empty_like(a, dtype=torch.uint8 if form == _DERIVATIVE8 else None)
        capability, whole = capability_of(x.device), aligned(x, weight)
        table = choose_tiles(rows, columns, x.dtype, capability, processors_of(x.device), whole, _WIDEST)

        def run(tiles: Tiles) -> tuple[Tensor | None, ...]:
            arguments = dict(
                x_ptr=x, weight_ptr=weight, bias_ptr=bias, a_ptr=a, kept_ptr=kept,
                M=rows, N=columns, K=inner, x_row=x.stride(0), weight_row=weight.stride(0), **constants,
                BLOCK_M=tiles.m, BLOCK_N=tiles.n, BLOCK_K=tiles.k, EVEN=inner % tiles.k == 0,
                PRECISION=precision(x.dtype),
            )  # fmt: skip
            grid = (triton.cdiv(rows, tiles.m) * triton.cdiv(columns, tiles.n),)
            launch(mlp_forward_fused, grid, arguments, tiles.warps, tiles.stages)
            return a, kept

        key = _key(rows, columns, inner, x, bias, constants) | {"aligned": whole}
        others = functools.partial(tile_candidates, table, x.dtype, capability, whole, _WIDEST)
        return tuned(mlp_forward_fused, x.device, key, table, others, run)
    z = torch.empty_like(a) if form == _PREACTIVATION else a
    # A bias of the product's own type is added by the product, which saves a pass over z where z is kept. With `out`,
    # neither autocast nor autograd touches it.
    if bias is not None and bias.dtype == x.dtype:
        torch.addmm(bias, x, weight.t(), out=z)
        bias = None
    else:
        torch.mm(x, weight.t(), out=z)
    kept = z if form == _PREACTIVATION else torch.empty_like(a, dtype=torch.uint8) if form == _DERIVATIVE8 else None
    stores = _NOTHING if form == _PREACTIVATION and bias is None else form
    constants = _constants(activation, stores)

    def run_beside(tile: _Tile, z: Tensor) -> tuple[Tensor | None, ...]:
        # z is changed in place where it becomes a, and where the bias is added to what is kept.
        to = a if form == _PREACTIVATION else z
        stored = None if not stores else z if form == _PREACTIVATION else kept
        arguments = dict(
            z_ptr=z, bias_ptr=bias, a_ptr=to, kept_ptr=stored, M=rows, N=columns,
            **constants, BLOCK_M=tile.m, BLOCK_N=tile.n,
        )  # fmt: skip
        grid = (triton.cdiv(rows, tile.m), triton.cdiv(columns, tile.n))
        launch(mlp_activate, grid, arguments, tile.warps, 1)
        return to, stored

    key = _key(rows, columns, inner, x, bias, constants)
    tuned(mlp_activate, x.device, key, _Tile(8, 256, 4), lambda: _ELEMENTWISE, run_beside, (z,))
    return a, kept


def backward_input(
    dy: Tensor, weight2: Tensor, kept: Tensor, activation: str, *, keep: str, variant: str | None = None
) -> Tensor:
    """Gradient of the preactivation.

    Args:
        dy: (M, N), gradient of the second layer's output.
        weight2: (N, K) of the second layer, last stride 1, in dy's dtype.
        kept: (M, K) from `forward`; with keep="nothing", z in dy's dtype, which the caller has computed again.
        activation: as given to `forward`.
        keep: as given to `forward`.
        variant: "fused" or "beside"; None for the chip's default.

    Returns:
        dz (M, K) in dy's dtype.

    Raises:
        ValueError: `backward_reasons` is not empty, or there is no such variant.
    """
    if dy.stride(-1) != 1:
        dy = dy.contiguous()
    _refuse(backward_reasons(dy, weight2, kept, activation, keep=keep))
    variant = _variant(variant, dy)
    rows, (columns, inner) = dy.shape[0], weight2.shape
    dz = torch.empty((rows, inner), dtype=dy.dtype, device=dy.device)
    constants = _constants(activation, _DERIVATIVE8 if keep == "derivative8" else _PREACTIVATION)
    key = _key(rows, columns, inner, dy, None, constants)
    if variant == "fused":
        capability, whole = capability_of(dy.device), aligned(dy, weight2)
        widest = _WIDEST if dy.dtype.itemsize == 2 else _WIDEST // 2
        table = choose_tiles(rows, inner, dy.dtype, capability, processors_of(dy.device), whole, widest)

        def run(tiles: Tiles) -> Tensor:
            arguments = dict(
                dy_ptr=dy, weight_ptr=weight2, kept_ptr=kept, dz_ptr=dz,
                M=rows, N=columns, K=inner, dy_row=dy.stride(0), weight_row=weight2.stride(0), **constants,
                BLOCK_M=tiles.m, BLOCK_N=tiles.n, BLOCK_K=tiles.k, EVEN=columns % tiles.k == 0,
                PRECISION=precision(dy.dtype),
            )  # fmt: skip
            grid = (triton.cdiv(rows, tiles.m) * triton.cdiv(inner, tiles.n),)
            launch(mlp_backward_fused, grid, arguments, tiles.warps, tiles.stages)
            return dz

        others = functools.partial(tile_candidates, table, dy.dtype, capability, whole, widest)
        return tuned(mlp_backward_fused, dy.device, key | {"aligned": whole}, table, others, run)
    torch.mm(dy, weight2, out=dz)

    def run_beside(tile: _Tile, dz: Tensor) -> Tensor:
        block = tile.m * tile.n
        arguments = dict(dz_ptr=dz, kept_ptr=kept, count=dz.numel(), **constants, BLOCK=block)
        launch(mlp_differentiate, (triton.cdiv(dz.numel(), block),), arguments, tile.warps, 1)
        return dz

    return tuned(mlp_differentiate, dz.device, key, _Tile(8, 256, 4), lambda: _ELEMENTWISE, run_beside, (dz,))


class _Tile(NamedTuple):
    """Rows and columns of a program that multiplies nothing (their product, where there are no rows), and its warps."""

    m: int
    n: int
    warps: int


_ELEMENTWISE = (_Tile(4, 256, 4), _Tile(4, 512, 4), _Tile(16, 256, 8), _Tile(2, 512, 4))


def _key(
    rows: int, columns: int, inner: int, x: Tensor, bias: Tensor | None, constants: dict[str, float]
) -> dict[str, object]:
    """Class of a launch."""
    return {
        "rows": rounded(rows),
        "columns": columns,
        "inner": inner,
        "dtype": x.dtype,
        "precision": precision(x.dtype),
        "bias": None if bias is None else bias.dtype,
        "activation": constants["CODE"],
        "form": constants["FORM"],
    }


def _refuse(found: list[str]) -> None:
    if found:
        raise ValueError(f"mlp cannot run: {'; '.join(found)}")


def _variant(variant: str | None, x: Tensor) -> str:
    if variant is None:
        return _DEFAULT_VARIANT.get(capability_of(x.device), "beside")
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}, expected one of {', '.join(VARIANTS)}")
    return variant


def _constants(activation: str, form: int) -> dict[str, float]:
    """What the epilogues are compiled for."""
    lowest, step = DERIVATIVE_RANGES[activation][0], derivative_step(activation)
    if form != _DERIVATIVE8:
        lowest = step = 1.0
    return {"CODE": CODES[activation], "FORM": form, "LOWEST": lowest, "STEP": step}
