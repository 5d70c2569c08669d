"""The bottleneck adapter in one pass over its input.

    z = x W_down^T + b_down,   h = act(z),   y = scale * (h W_up^T + b_up) + residual

    dz = scale * (dy W_up) * act'(z),   dx = dz W_down (+ dy with a skip connection)
    dW_down = dz^T x,   db_down = sum of dz,   dW_up = scale * dy^T h,   db_up = scale * sum of dy

A program owns a block of rows and keeps their hidden units in registers; x is all that is saved for the backward
pass, which computes z again. Hidden units and their gradients are written only for the factors' gradients, which are
sums over rows: these are split among a number of programs that the device fixes, and added in a fixed order. Factors
in fp32 are rounded to x's dtype as they are loaded.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpeft.kernels._activation import CODES, activate, derivative
from fastpeft.kernels._compile import SHARED_LIMIT
from fastpeft.kernels._launch import capability_of, launch, processors_of
from fastpeft.kernels._matmul import aligned, precision, type_reasons
from fastpeft.kernels._tune import rounded, tuned

MOST_HIDDEN = 256
# Numbers of rows are 32-bit in the kernels; offsets are 64-bit.
_MOST_ROWS = 2**30


@triton.jit
def _tile(pointers, mask, row_mask, EVEN: tl.constexpr):
    """Load a tile whose other mask, that of its columns, is all true if EVEN."""
    return tl.load(pointers, mask=row_mask if EVEN else row_mask & mask, other=0.0)


@triton.jit
def adapter_forward(
    x_ptr,  # (M, d), row stride x_row
    down_ptr,  # (hidden, d), row stride down_row
    down_bias_ptr,  # (hidden,) or None
    up_ptr,  # (d, hidden), row stride up_row
    up_bias_ptr,  # (d,) or None
    residual_ptr,  # (M, d), row stride residual_row; or None
    y_ptr,  # (M, d), contiguous
    M,
    d,
    hidden,
    x_row,
    down_row,
    up_row,
    residual_row,
    scale,
    CODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EVEN: tl.constexpr,  # d is a multiple of BLOCK_D
    PRECISION: tl.constexpr,
):
    """A block of rows of y."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    units = tl.arange(0, BLOCK_H)
    row_mask, unit_mask = (rows < M)[:, None], (units < hidden)[None, :]
    x_rows = x_ptr + rows[:, None] * x_row

    z = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32)
    for first in range(0, d, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        x = _tile(x_rows + columns[None, :], (columns < d)[None, :], row_mask, EVEN)
        down = _tile(down_ptr + units[None, :] * down_row + columns[:, None], (columns < d)[:, None], unit_mask, EVEN)
        z = tl.dot(x, down.to(x.dtype), z, input_precision=PRECISION)
    if down_bias_ptr is not None:
        z += tl.load(down_bias_ptr + units, mask=units < hidden, other=0.0).to(tl.float32)[None, :]
    h = activate(z, CODE).to(x_ptr.dtype.element_ty)

    for first in range(0, d, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        column_mask = (columns < d)[None, :]
        up = _tile(up_ptr + columns[None, :] * up_row + units[:, None], column_mask, (units < hidden)[:, None], EVEN)
        y = tl.dot(h, up.to(h.dtype), input_precision=PRECISION)
        if up_bias_ptr is not None:
            y += tl.load(up_bias_ptr + columns, mask=columns < d, other=0.0).to(tl.float32)[None, :]
        y *= scale
        if residual_ptr is not None:
            residual = residual_ptr + rows[:, None] * residual_row + columns[None, :]
            y += _tile(residual, column_mask, row_mask, EVEN).to(tl.float32)
        tl.store(y_ptr + rows[:, None] * d + columns[None, :], y.to(h.dtype), mask=row_mask & column_mask)


@triton.jit
def adapter_backward_rows(
    dy_ptr,  # (M, d), row stride dy_row
    x_ptr,  # (M, d), row stride x_row
    down_ptr,  # (hidden, d), row stride down_row
    down_bias_ptr,  # (hidden,) or None
    up_ptr,  # (d, hidden), row stride up_row
    dx_ptr,  # (M, d), contiguous; or None
    h_ptr,  # (M, hidden), contiguous; None with dz, unless the factors need gradients
    dz_ptr,  # (M, hidden), contiguous; or None
    dz_sum_ptr,  # (programs, hidden) fp32, or None
    M,
    d,
    hidden,
    dy_row,
    x_row,
    down_row,
    up_row,
    scale,
    SKIP: tl.constexpr,
    CODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EVEN: tl.constexpr,  # d is a multiple of BLOCK_D
    PRECISION: tl.constexpr,
):
    """A block of rows of dx, and the hidden units and their gradients."""
    program = tl.program_id(0).to(tl.int64)
    rows = program * BLOCK_M + tl.arange(0, BLOCK_M)
    units = tl.arange(0, BLOCK_H)
    row_mask, unit_mask = (rows < M)[:, None], (units < hidden)[None, :]
    x_rows, dy_rows = x_ptr + rows[:, None] * x_row, dy_ptr + rows[:, None] * dy_row

    z = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32)
    dh = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32)
    for first in range(0, d, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D)
        row_wise, column_wise = (columns < d)[None, :], (columns < d)[:, None]
        x = _tile(x_rows + columns[None, :], row_wise, row_mask, EVEN)
        down = _tile(down_ptr + units[None, :] * down_row + columns[:, None], column_wise, unit_mask, EVEN)
        z = tl.dot(x, down.to(x.dtype), z, input_precision=PRECISION)
        dy = _tile(dy_rows + columns[None, :], row_wise, row_mask, EVEN)
        up = _tile(up_ptr + columns[:, None] * up_row + units[None, :], column_wise, unit_mask, EVEN)
        dh = tl.dot(dy, up.to(x.dtype), dh, input_precision=PRECISION)
    if down_bias_ptr is not None:
        z += tl.load(down_bias_ptr + units, mask=units < hidden, other=0.0).to(tl.float32)[None, :]
    dz = dh * scale * derivative(z, CODE)
    if dz_sum_ptr is not None:
        tl.store(dz_sum_ptr + program * hidden + units, tl.sum(dz, axis=0), mask=units < hidden)
    dz = dz.to(x_ptr.dtype.element_ty)
    if h_ptr is not None:
        place = rows[:, None] * hidden + units[None, :]
        tl.store(h_ptr + place, activate(z, CODE).to(dz.dtype), mask=row_mask & unit_mask)
        tl.store(dz_ptr + place, dz, mask=row_mask & unit_mask)

    if dx_ptr is not None:
        for first in range(0, d, BLOCK_D):
            columns = first + tl.arange(0, BLOCK_D)
            column_mask = (columns < d)[None, :]
            down = _tile(
                down_ptr + units[:, None] * down_row + columns[None, :], column_mask, (units < hidden)[:, None], EVEN
            )
            dx = tl.dot(dz, down.to(dz.dtype), input_precision=PRECISION)
            if SKIP:
                dx += _tile(dy_rows + columns[None, :], column_mask, row_mask, EVEN).to(tl.float32)
            tl.store(dx_ptr + rows[:, None] * d + columns[None, :], dx.to(dz.dtype), mask=row_mask & column_mask)


@triton.jit
def adapter_backward_factor(
    left_ptr,  # (M, P), row stride left_row
    right_ptr,  # (M, Q), row stride right_row
    out_ptr,  # (splits, P, Q) fp32
    sum_ptr,  # (splits, P) fp32, or None
    M,
    P,
    Q,
    left_row,
    right_row,
    blocks,  # of BLOCK_M rows for each split
    factor,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One split's share of a tile of factor * left^T right, and of factor * the sums of left's columns."""
    split = tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(Q, BLOCK_Q)
    ps = (tl.program_id(0) // tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    qs = (tl.program_id(0) % tiles) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    acc = tl.zeros((BLOCK_P, BLOCK_Q), dtype=tl.float32)
    total = tl.zeros((BLOCK_P,), dtype=tl.float32)
    for block in range(split * blocks, tl.minimum(split * blocks + blocks, tl.cdiv(M, BLOCK_M))):
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        left = left_ptr + rows[None, :] * left_row + ps[:, None]
        left = tl.load(left, mask=(rows < M)[None, :] & (ps < P)[:, None], other=0.0)
        right = right_ptr + rows[:, None] * right_row + qs[None, :]
        right = tl.load(right, mask=(rows < M)[:, None] & (qs < Q)[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
        if sum_ptr is not None:
            total += tl.sum(left.to(tl.float32), axis=1)
    out = out_ptr + (split * P + ps[:, None]) * Q + qs[None, :]
    tl.store(out, acc * factor, mask=(ps < P)[:, None] & (qs < Q)[None, :])
    if sum_ptr is not None:
        if tl.program_id(0) % tiles == 0:
            tl.store(sum_ptr + split * P + ps, total * factor, mask=ps < P)


def reasons(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    activation: str,
    scale: float,
    *,
    residual: Tensor | None = None,
) -> list[str]:
    """Why `forward` and `backward` cannot serve these arguments; empty if they can."""
    if x.dim() != 2 or 0 in x.shape[1:]:
        return [f"x is {tuple(x.shape)}, not rows of one or more columns"]
    found = type_reasons(x.dtype, capability_of(x.device))
    if x.shape[0] > _MOST_ROWS:
        found.append(f"there are more than {_MOST_ROWS} rows")
    if activation not in CODES:
        found.append(f"the activation {activation!r} is not one of {', '.join(CODES)}")
    d, hidden = x.shape[1], down_weight.shape[0]
    if not 1 <= hidden <= MOST_HIDDEN:
        found.append(f"there are {hidden} hidden units, not 1 to {MOST_HIDDEN}")
    for name, factor, shape in (
        ("down_weight", down_weight, (hidden, d)),
        ("down_bias", down_bias, (hidden,)),
        ("up_weight", up_weight, (d, hidden)),
        ("up_bias", up_bias, (d,)),
    ):
        if factor is None:
            continue
        if factor.shape != shape or factor.dtype not in (x.dtype, torch.float32) or factor.device != x.device:
            found.append(f"{name} is {_form(factor)}, not {shape} in {x.dtype} or float32 on {x.device}")
        elif not _side_by_side(factor):
            found.append(f"the columns of {name} do not lie side by side")
    if residual is not None and (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        found.append(f"the residual is {_form(residual)}, x is {_form(x)}")
    for name, t in (("x", x), ("the residual", residual)):
        if t is not None and not _side_by_side(t):
            found.append(f"the columns of {name} do not lie side by side")
    return found


def _form(t: Tensor) -> str:
    return f"{tuple(t.shape)} in {t.dtype} on {t.device}"


def _side_by_side(t: Tensor) -> bool:
    return t.stride(-1) == 1 or t.shape[-1] == 1


def forward(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    activation: str,
    scale: float,
    *,
    residual: Tensor | None = None,
) -> Tensor:
    """The adapter's output with the residual.

    Args:
        x: (M, d) in fp16, bf16 or fp32, rows of any stride.
        down_weight: (hidden, d), hidden from 1 to 256, in x's dtype or fp32.
        down_bias: (hidden,), like the weight; or None.
        up_weight: (d, hidden), likewise.
        up_bias: (d,), likewise; or None.
        activation: a name of `CODES`.
        scale: factor of the up-projection.
        residual: (M, d) in x's dtype, x itself for a skip connection; or None.

    Returns:
        (M, d) in x's dtype, contiguous.
    """
    M, d = x.shape
    hidden = down_weight.shape[0]
    y = torch.empty((M, d), dtype=x.dtype, device=x.device)
    table = _row_tiles(x, down_weight, up_weight, products=1)

    def run(tiles: _RowTiles) -> Tensor:
        arguments = {
            "x_ptr": x,
            "down_ptr": down_weight,
            "down_bias_ptr": down_bias,
            "up_ptr": up_weight,
            "up_bias_ptr": up_bias,
            "residual_ptr": residual,
            "y_ptr": y,
            "M": M,
            "d": d,
            "hidden": hidden,
            "x_row": x.stride(0),
            "down_row": down_weight.stride(0),
            "up_row": up_weight.stride(0),
            "residual_row": 0 if residual is None else residual.stride(0),
            "scale": float(scale),
            "CODE": CODES[activation],
            "BLOCK_M": tiles.m,
            "BLOCK_D": tiles.d,
            "BLOCK_H": tiles.h,
            "EVEN": d % tiles.d == 0,
            "PRECISION": precision(x.dtype),
        }
        launch(adapter_forward, (triton.cdiv(M, tiles.m),), arguments, tiles.warps, tiles.stages)
        return y

    key = _key(x, down_weight, up_weight, down_bias, activation)
    key |= {"up_bias": up_bias is not None, "residual": residual is not None}
    others = functools.partial(_row_candidates, table, x, down_weight, up_weight, products=1)
    return tuned(adapter_forward, x.device, key, table, others, run)


def backward(
    dy: Tensor,
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    activation: str,
    scale: float,
    *,
    skip: bool,
    needs_x: bool = True,
    needs_weights: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients, None where not asked for.

    Args:
        dy: gradient of y, (M, d).
        x: as given to `forward`.
        down_weight: as given to `forward`.
        down_bias: as given to `forward`.
        up_weight: as given to `forward`.
        up_bias: as given to `forward`.
        activation: as given to `forward`.
        scale: as given to `forward`.
        skip: the residual was x itself, so that dx contains dy. The gradient of any other residual is dy.
        needs_x: compute dx.
        needs_weights: compute the gradients of the weights and of the biases that there are.

    Returns:
        dx, (M, d) in x's dtype, and the gradients of down_weight, down_bias, up_weight and up_bias in their dtypes.
    """
    if not (needs_x or needs_weights):
        return None, None, None, None, None
    if not _side_by_side(dy):
        # Autograd may send any layout, such as one element spread over all.
        dy = dy.contiguous()
    M, d = x.shape
    hidden = down_weight.shape[0]
    table = _row_tiles(x, down_weight, up_weight, products=2)
    dx = torch.empty((M, d), dtype=x.dtype, device=x.device) if needs_x else None
    h, dz = (torch.empty((M, hidden), dtype=x.dtype, device=x.device) if needs_weights else None for _ in range(2))

    def run(tiles: _RowTiles) -> tuple[Tensor | None, ...]:
        programs = triton.cdiv(M, tiles.m)
        dz_sum = None
        if needs_weights and down_bias is not None:
            dz_sum = torch.empty((programs, hidden), dtype=torch.float32, device=x.device)
        arguments = {
            "dy_ptr": dy,
            "x_ptr": x,
            "down_ptr": down_weight,
            "down_bias_ptr": down_bias,
            "up_ptr": up_weight,
            "dx_ptr": dx,
            "h_ptr": h,
            "dz_ptr": dz,
            "dz_sum_ptr": dz_sum,
            "M": M,
            "d": d,
            "hidden": hidden,
            "dy_row": dy.stride(0),
            "x_row": x.stride(0),
            "down_row": down_weight.stride(0),
            "up_row": up_weight.stride(0),
            "scale": float(scale),
            "SKIP": skip,
            "CODE": CODES[activation],
            "BLOCK_M": tiles.m,
            "BLOCK_D": tiles.d,
            "BLOCK_H": tiles.h,
            "EVEN": d % tiles.d == 0,
            "PRECISION": precision(x.dtype),
        }
        launch(adapter_backward_rows, (programs,), arguments, tiles.warps, tiles.stages)
        return dx, h, dz, None if dz_sum is None else torch.sum(dz_sum, 0)

    key = _key(x, down_weight, up_weight, down_bias, activation)
    key |= {"needs_x": needs_x, "needs_weights": needs_weights, "skip": skip}
    others = functools.partial(_row_candidates, table, x, down_weight, up_weight, products=2)
    d_down_bias = tuned(adapter_backward_rows, x.device, key, table, others, run)[3]
    if not needs_weights:
        return dx, None, None, None, None
    d_down, _ = _summed(dz, x, 1.0, sums=False)
    d_up, d_up_bias = _summed(dy, h, float(scale), sums=up_bias is not None)
    return (
        dx,
        d_down.to(down_weight.dtype),
        None if d_down_bias is None else d_down_bias.to(down_bias.dtype),
        d_up.to(up_weight.dtype),
        None if up_bias is None else d_up_bias.to(up_bias.dtype),
    )


def _summed(left: Tensor, right: Tensor, factor: float, sums: bool) -> tuple[Tensor, Tensor | None]:
    """factor * left^T right, (P, Q), and factor * the sums of left's columns, (P,), from (M, P) and (M, Q); in fp32."""
    (M, P), Q = left.shape, right.shape[1]
    table = _factor_tiles(left, right)

    def run(tiles: _FactorTiles) -> tuple[Tensor, Tensor | None]:
        count = triton.cdiv(P, tiles.p) * triton.cdiv(Q, tiles.q)
        splits = max(1, min(processors_of(left.device) // count, triton.cdiv(M, tiles.m)))
        blocks = triton.cdiv(triton.cdiv(M, tiles.m), splits)
        splits = triton.cdiv(M, tiles.m * blocks) if blocks else 0
        out = torch.empty((splits, P, Q), dtype=torch.float32, device=left.device)
        total = torch.empty((splits, P), dtype=torch.float32, device=left.device) if sums else None
        arguments = {
            "left_ptr": left,
            "right_ptr": right,
            "out_ptr": out,
            "sum_ptr": total,
            "M": M,
            "P": P,
            "Q": Q,
            "left_row": left.stride(0),
            "right_row": right.stride(0),
            "blocks": blocks,
            "factor": factor,
            "BLOCK_M": tiles.m,
            "BLOCK_P": tiles.p,
            "BLOCK_Q": tiles.q,
            "PRECISION": precision(left.dtype),
        }
        launch(adapter_backward_factor, (count, splits), arguments, tiles.warps, tiles.stages)
        return torch.sum(out, 0), torch.sum(total, 0) if sums else None

    key = {
        "rows": rounded(M),
        "columns": f"{P}x{Q}",
        "dtype": left.dtype,
        "precision": precision(left.dtype),
        "aligned": aligned(left, right),
        "sums": sums,
    }
    others = functools.partial(_factor_candidates, table, left, right)
    return tuned(adapter_backward_factor, left.device, key, table, others, run)


def _key(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, activation: str) -> dict[str, object]:
    """Class of a launch over rows."""
    return {
        "rows": rounded(x.shape[0]),
        "columns": x.shape[1],
        "hidden": down.shape[0],
        "dtype": x.dtype,
        "precision": precision(x.dtype),
        "factors": down.dtype if down.dtype == up.dtype else f"{down.dtype}+{up.dtype}",
        "activation": activation,
        "bias": None if bias is None else bias.dtype,
        "aligned": aligned(x, down, up),
    }


@dataclass(frozen=True)
class _RowTiles:
    """A program's rows, its columns a step, all hidden units (padded), its warps and the stages of its pipeline."""

    m: int
    d: int
    h: int
    warps: int
    stages: int


@dataclass(frozen=True)
class _FactorTiles:
    """A program's tile of a factor's gradient, its rows a step, its warps and the stages of its pipeline."""

    m: int
    p: int
    q: int
    warps: int
    stages: int


def _multiplies_matrices(dtype: torch.dtype, capability: int) -> bool:
    """Whether products become matrix instructions; otherwise the operands of a step pass through registers."""
    # Triton has none for compute capability 7.5.
    return capability >= 80 and (dtype != torch.float32 or precision(dtype) == "tf32")


def _stages(most: int, step: int, capability: int) -> int:
    """Stages of `step` bytes that fit into shared memory, with room for what the epilogue rearranges there."""
    limit = SHARED_LIMIT.get(capability, SHARED_LIMIT[75])
    return max(1, min(most, (limit - 16384) // step))


def _row_tiles(x: Tensor, down_weight: Tensor, up_weight: Tensor, products: int) -> _RowTiles:
    """Tiles of a kernel that makes so many products with all hidden units in one loop over the columns."""
    capability = capability_of(x.device)
    h = max(16, triton.next_power_of_2(down_weight.shape[0]))
    if not _multiplies_matrices(x.dtype, capability):
        m, d, warps = 32 if products * h <= 128 else 16, 16, 8
    else:
        # Elements that are loaded one by one take an address register each.
        narrow, whole = products * h <= 256, aligned(x, down_weight, up_weight)
        m, d, warps = 64 if narrow else 32 if whole else 16, 64 if whole else 32, 4 if h <= 64 else 8
    while m > 16 and triton.cdiv(x.shape[0], m) < processors_of(x.device):
        m //= 2
    column = _column_bytes(m, h, x, down_weight, up_weight, products)
    if d == 64 and _stages(3, d * column, capability) < 3:
        d = 32
    return _RowTiles(m, d, h, warps, _stages(4, d * column, capability))


def _column_bytes(m: int, h: int, x: Tensor, down_weight: Tensor, up_weight: Tensor, products: int) -> int:
    """Bytes that a stage needs for a column of m rows and of the factors."""
    return products * (m * x.element_size() + h * max(down_weight.element_size(), up_weight.element_size()))


def _row_candidates(
    table: _RowTiles, x: Tensor, down_weight: Tensor, up_weight: Tensor, products: int
) -> list[_RowTiles]:
    """Tiles that may be faster than the table's; none where elements are loaded one by one or multiplied so."""
    capability = capability_of(x.device)
    if not _multiplies_matrices(x.dtype, capability) or not aligned(x, down_weight, up_weight):
        return []
    m, d, h, warps = table.m, table.d, table.h, table.warps
    # What is left out, fewer warps above all, spills on one chip or another.
    shapes = [(m, d, warps, 2), (m, 32, warps, 4) if products == 1 else (m // 2, d, warps, 4)]
    if warps == 4:
        shapes.append((m, d, 8, 4))
    if products * h <= 128:
        shapes.append((2 * m, d, 8, 3))
    found = []
    for m, d, warps, stages in shapes:
        fits = _stages(stages, d * _column_bytes(m, h, x, down_weight, up_weight, products), capability)
        if m >= 16 and fits > 1:
            found.append(_RowTiles(m, d, h, warps, fits))
    return found


def _factor_tiles(left: Tensor, right: Tensor) -> _FactorTiles:
    """Tiles of left^T right for two tall matrices."""
    capability = capability_of(left.device)
    if not _multiplies_matrices(left.dtype, capability):
        m, most = 16, 64
    elif not aligned(left, right):
        m, most = 32, 64
    else:
        m, most = 64, 128
    p, q = (min(most, max(16, triton.next_power_of_2(size))) for size in (left.shape[1], right.shape[1]))
    step = m * (p + q) * left.element_size()
    return _FactorTiles(m, p, q, 4 if p * q <= 64 * 128 else 8, _stages(4, step, capability))


def _factor_candidates(table: _FactorTiles, left: Tensor, right: Tensor) -> list[_FactorTiles]:
    """Tiles that may be faster than the table's; none where elements are loaded one by one or multiplied so."""
    capability = capability_of(left.device)
    if not _multiplies_matrices(left.dtype, capability) or not aligned(left, right):
        return []
    m, p, q = table.m, table.p, table.q
    shapes = [(m // 2, p, q, table.warps)]
    shapes += [(m, p, q, 8)] if table.warps == 4 else []
    shapes += [(m, p // 2, q, 4)] if p > 64 else []
    shapes += [(m, p, q // 2, 4)] if q > 64 else []
    size = left.element_size()
    return [_FactorTiles(m, p, q, w, _stages(4, m * (p + q) * size, capability)) for m, p, q, w in shapes]
