"""LayerNorm, with the residual sum before it.

    s = x + gamma * branch,   y = xhat * weight + bias,   xhat = (s - mean) * rstd

    g = dy * weight,   dx = rstd * (g - mean_d(g) - xhat * mean_d(g * xhat)) + ds,   dbranch = gamma * dx
    dweight = sum over rows of dy * xhat,   dbias = sum over rows of dy

A row lies in registers whole: it is read once, and its variance is the mean of squares that are already centred. The
backward pass computes xhat again from s and two numbers a row. Sums over rows are split among a number of programs
that the device fixes, and added in a fixed order: equal inputs give equal bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpeft.kernels._launch import capability_of, launch, processors_of
from fastpeft.kernels._matmul import type_reasons
from fastpeft.kernels._tune import rounded, tuned

MOST_COLUMNS = 4096
# Numbers of rows are 32-bit in the kernels; offsets are 64-bit.
_MOST_ROWS = 2**30


@triton.jit
def _row_offsets(rows, rows_per_batch, batch_stride, row_stride):
    """Offset of each row's first element; rows are counted through the batch."""
    batch = (rows // rows_per_batch).to(tl.int64)
    row = (rows % rows_per_batch).to(tl.int64)
    return (batch * batch_stride + row * row_stride)[:, None]


@triton.jit
def _forward_kernel(
    x_ptr,  # (B, N, d), last stride 1
    branch_ptr,  # like x, or None
    gamma_ptr,  # (d,) or None
    weight_ptr,  # (d,) or None
    bias_ptr,  # (d,) or None
    y_ptr,  # (B * N, d)
    s_ptr,  # (B * N, d); None without a branch
    mean_ptr,  # (B * N,) fp32
    rstd_ptr,  # (B * N,) fp32
    x_batch,
    x_row,
    branch_batch,
    branch_row,
    rows_per_batch,  # N
    M,  # B * N
    d,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    inside = columns < d
    mask = (rows < M)[:, None] & inside
    out = rows.to(tl.int64)[:, None] * d + columns

    s = tl.load(x_ptr + _row_offsets(rows, rows_per_batch, x_batch, x_row) + columns, mask=mask, other=0.0)
    if branch_ptr is not None:
        branch = branch_ptr + _row_offsets(rows, rows_per_batch, branch_batch, branch_row) + columns
        added = tl.load(branch, mask=mask, other=0.0).to(tl.float32)
        if gamma_ptr is not None:
            added *= tl.load(gamma_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        # Rounded before the statistics, which the backward pass applies to what is stored.
        s = (s.to(tl.float32) + added).to(s.dtype)
        tl.store(s_ptr + out, s, mask=mask)
    s = s.to(tl.float32)

    mean = tl.sum(s, axis=1) / d
    centred = tl.where(inside, s - mean[:, None], 0.0)
    rstd = tl.math.rsqrt(tl.sum(centred * centred, axis=1) / d + eps)
    y = centred * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=rows < M)
    tl.store(rstd_ptr + rows, rstd, mask=rows < M)


@triton.jit
def _backward_kernel(
    dy_ptr,  # (B, N, d), last stride 1
    s_ptr,  # (B, N, d), last stride 1
    ds_ptr,  # (B, N, d), last stride 1, or None
    gamma_ptr,  # (d,) or None
    weight_ptr,  # (d,) or None
    mean_ptr,  # (B * N,) fp32
    rstd_ptr,  # (B * N,) fp32
    dx_ptr,  # (B * N, d) or None
    dbranch_ptr,  # (B * N, d) or None
    dbias_ptr,  # (programs, d) fp32 or None
    dweight_ptr,  # (programs, d) fp32 or None
    dy_batch,
    dy_row,
    s_batch,
    s_row,
    ds_batch,
    ds_row,
    rows_per_batch,  # N
    M,  # B * N
    d,
    blocks,  # of ROWS rows for each program
    INPUTS: tl.constexpr,  # dx or dbranch is asked for
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)[None, :]
    inside = columns < d
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    for block in range(program * blocks, tl.minimum(program * blocks + blocks, tl.cdiv(M, ROWS))):
        rows = block * ROWS + tl.arange(0, ROWS)
        mask = (rows < M)[:, None] & inside
        dy = tl.load(dy_ptr + _row_offsets(rows, rows_per_batch, dy_batch, dy_row) + columns, mask=mask, other=0.0)
        dy = dy.to(tl.float32)
        if dbias_ptr is not None:
            dbias += dy
        if INPUTS or dweight_ptr is not None:
            s = tl.load(s_ptr + _row_offsets(rows, rows_per_batch, s_batch, s_row) + columns, mask=mask, other=0.0)
            mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)[:, None]
            rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)[:, None]
            xhat = tl.where(inside, (s.to(tl.float32) - mean) * rstd, 0.0)
            if dweight_ptr is not None:
                dweight += dy * xhat
            if INPUTS:
                g = dy
                if weight_ptr is not None:
                    g *= tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
                shift = tl.sum(g, axis=1)[:, None] / d
                slope = tl.sum(g * xhat, axis=1)[:, None] / d
                dx = (g - shift - xhat * slope) * rstd
                if ds_ptr is not None:
                    ds = ds_ptr + _row_offsets(rows, rows_per_batch, ds_batch, ds_row) + columns
                    dx += tl.load(ds, mask=mask, other=0.0).to(tl.float32)
                out = rows.to(tl.int64)[:, None] * d + columns
                if dx_ptr is not None:
                    tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
                if dbranch_ptr is not None:
                    if gamma_ptr is not None:
                        dx *= tl.load(gamma_ptr + columns, mask=inside, other=0.0).to(tl.float32)
                    tl.store(dbranch_ptr + out, dx.to(dbranch_ptr.dtype.element_ty), mask=mask)
    place = program.to(tl.int64) * d + tl.arange(0, BLOCK)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + place, tl.sum(dbias, axis=0), mask=tl.arange(0, BLOCK) < d)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + place, tl.sum(dweight, axis=0), mask=tl.arange(0, BLOCK) < d)


def reasons(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    branch: Tensor | None = None,
    gamma: Tensor | None = None,
) -> list[str]:
    """Why `forward` and `backward` cannot serve these arguments; empty if they can."""
    d = x.shape[-1] if x.dim() else 0
    if not 1 <= d <= MOST_COLUMNS:
        return [f"rows have {d} columns, not 1 to {MOST_COLUMNS}"]
    found = type_reasons(x.dtype, capability_of(x.device))
    if x.numel() // d > _MOST_ROWS:
        found.append(f"there are more than {_MOST_ROWS} rows")
    tensors = [x] if branch is None else [x, branch]
    if branch is not None and (branch.shape, branch.dtype, branch.device) != (x.shape, x.dtype, x.device):
        found.append(f"the branch is {_form(branch)}, x is {_form(x)}")
    elif _rows(tensors) is None:
        found.append("the rows do not lie at one or two strides with their columns side by side")
    for name, parameter in (("weight", weight), ("bias", bias), ("gamma", gamma)):
        if parameter is None:
            continue
        if parameter.shape != (d,) or parameter.dtype not in (x.dtype, torch.float32) or parameter.device != x.device:
            found.append(f"{name} is {_form(parameter)}, not ({d},) in {x.dtype} or float32 on {x.device}")
        elif not parameter.is_contiguous():
            found.append(f"{name} is not contiguous")
    return found


def _form(t: Tensor) -> str:
    return f"{tuple(t.shape)} in {t.dtype} on {t.device}"


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    branch: Tensor | None = None,
    gamma: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The normalised sum and what its backward pass keeps.

    Args:
        x: (..., d) in fp16, bf16 or fp32; rows of any stride, d from 1 to 4096.
        weight: (d,) in x's dtype or fp32, or None.
        bias: like weight.
        eps: added to the variance.
        branch: of x's shape and dtype, or None.
        gamma: factor of the branch, like weight; has no effect without a branch.

    Returns:
        y and s, (..., d) in x's dtype, s being x itself without a branch; mean and rstd, (rows,) in fp32.
    """
    strides, rows_per_batch = _rows([x] if branch is None else [x, branch])
    d = x.shape[-1]
    M = x.numel() // d
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    s = None if branch is None else torch.empty_like(y)
    mean = torch.empty(M, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    block = triton.next_power_of_2(d)

    def run(tile: _Tile) -> tuple[Tensor | None, ...]:
        arguments = {
            "x_ptr": x,
            "branch_ptr": branch,
            "gamma_ptr": gamma,
            "weight_ptr": weight,
            "bias_ptr": bias,
            "y_ptr": y,
            "s_ptr": s,
            "mean_ptr": mean,
            "rstd_ptr": rstd,
            "x_batch": strides[0][0],
            "x_row": strides[0][1],
            "branch_batch": strides[-1][0],
            "branch_row": strides[-1][1],
            "rows_per_batch": rows_per_batch,
            "M": M,
            "d": d,
            "eps": float(eps),
            "ROWS": tile.rows,
            "BLOCK": block,
        }
        launch(_forward_kernel, (triton.cdiv(M, tile.rows),), arguments, tile.warps, 1)
        return y, s, mean, rstd

    key = _key(M, d, strides, (x, branch, branch if branch is None else gamma, weight, bias))
    table = _tile(M, block, processors_of(x.device))
    tuned(_forward_kernel, x.device, key, table, lambda: _candidates(table, block), run)
    return y, x if branch is None else s, mean, rstd


def backward(
    dy: Tensor,
    s: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    *,
    ds: Tensor | None = None,
    gamma: Tensor | None = None,
    needs_x: bool = True,
    needs_branch: bool = False,
    needs_bias: bool = False,
    needs_weight: bool = False,
    bias_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients, None where not asked for.

    Args:
        dy: gradient of y, (..., d).
        s: as returned by `forward`.
        weight: as given to `forward`.
        mean: as returned by `forward`.
        rstd: as returned by `forward`.
        ds: gradient that arrives at s from elsewhere, (..., d), or None.
        gamma: as given to `forward`.
        needs_x: compute dx.
        needs_branch: compute dbranch.
        needs_bias: compute dbias.
        needs_weight: compute dweight.
        bias_dtype: of dbias, since the bias itself is not given; None for the weight's, or s's without a weight.

    Returns:
        dx and dbranch, (..., d) in s's dtype, one and the same tensor without a gamma; dbias, (d,) in
        `bias_dtype`; dweight, (d,) in the weight's dtype.
    """
    needs_weight = needs_weight and weight is not None
    bias_dtype = bias_dtype or (s if weight is None else weight).dtype
    if not (needs_x or needs_branch or needs_bias or needs_weight):
        return None, None, None, None
    found = _rows([dy, s] if ds is None else [dy, s, ds])
    if found is None:
        # Autograd may send any layout, such as one element spread over all; the rows of s lie as forward saw them.
        dy, ds = dy.contiguous(), None if ds is None else ds.contiguous()
        found = _rows([dy, s] if ds is None else [dy, s, ds])
    strides, rows_per_batch = found
    d = s.shape[-1]
    M = s.numel() // d
    processors = processors_of(s.device)
    block, sums = triton.next_power_of_2(d), needs_bias or needs_weight
    table = _tile(M, block, processors)
    if sums:
        # The sums lie in registers beside the rows.
        table = table._replace(rows=max(1, min(table.rows, 2048 // block)))
    apart = needs_branch and gamma is not None
    dx = torch.empty(s.shape, dtype=s.dtype, device=s.device) if needs_x or (needs_branch and not apart) else None
    dbranch = torch.empty(s.shape, dtype=s.dtype, device=s.device) if apart else None

    def run(tile: _Tile) -> tuple[Tensor | None, ...]:
        # Four programs a processor: while some wait for their rows the others compute.
        each = max(1, triton.cdiv(M, tile.rows * 4 * processors)) if sums else 1
        programs = triton.cdiv(M, tile.rows * each)
        dbias, dweight = (
            torch.empty((programs, d), dtype=torch.float32, device=s.device) if need else None
            for need in (needs_bias, needs_weight)
        )
        arguments = {
            "dy_ptr": dy,
            "s_ptr": s,
            "ds_ptr": ds,
            "gamma_ptr": gamma if apart else None,
            "weight_ptr": weight,
            "mean_ptr": mean,
            "rstd_ptr": rstd,
            "dx_ptr": dx,
            "dbranch_ptr": dbranch,
            "dbias_ptr": dbias,
            "dweight_ptr": dweight,
            "dy_batch": strides[0][0],
            "dy_row": strides[0][1],
            "s_batch": strides[1][0],
            "s_row": strides[1][1],
            "ds_batch": strides[-1][0],
            "ds_row": strides[-1][1],
            "rows_per_batch": rows_per_batch,
            "M": M,
            "d": d,
            "blocks": each,
            "INPUTS": needs_x or needs_branch,
            "ROWS": tile.rows,
            "BLOCK": block,
        }
        launch(_backward_kernel, (programs,), arguments, tile.warps, 1)
        return dx, dbranch, *(None if part is None else torch.sum(part, 0) for part in (dbias, dweight))

    key = _key(M, d, strides, (s, ds, gamma if apart else None, weight, dx, dbranch))
    key |= {"sums": needs_bias + 2 * needs_weight}
    _, _, dbias, dweight = tuned(_backward_kernel, s.device, key, table, lambda: _candidates(table, block, sums), run)
    return (
        dx if needs_x else None,
        (dbranch if apart else dx) if needs_branch else None,
        None if dbias is None else dbias.to(bias_dtype),
        None if dweight is None else dweight.to(weight.dtype),
    )


class _Tile(NamedTuple):
    """Rows of a program's tile, and its warps."""

    rows: int
    warps: int


def _tile(rows: int, block: int, processors: int) -> _Tile:
    """The table's choice for so many rows, padded to `block` columns."""
    if block > 1024:
        return _Tile(1, block // 512)
    # A warp has at most one row of 1024: its sums then need no shared memory.
    warps = 4
    tile = min(max(1, 1024 // block), 4) * warps
    while tile > 1 and triton.cdiv(rows, tile) < 2 * processors:
        tile //= 2
    return _Tile(tile, min(warps, max(1, tile * block // 256)))


def _candidates(table: _Tile, block: int, sums: bool = False) -> list[_Tile]:
    """Half and twice the rows or warps, 256 to 1024 numbers for each warp; rows are not doubled beside sums."""
    most = table.rows * block // table.warps if sums else 1024
    pairs = [(1, 2), (2, 1), (1, 4), (2, 4)] + ([] if sums else [(4, 1), (4, 2), (4, 4)])
    found = (_Tile(table.rows * rows // 2, table.warps * warps // 2) for rows, warps in pairs)
    return [t for t in found if t.rows and 1 <= t.warps <= 8 and 256 <= t.rows * block // t.warps <= most]


def _key(
    rows: int, columns: int, strides: list[tuple[int, int]], tensors: tuple[Tensor | None, ...]
) -> dict[str, object]:
    """Class of a launch: which tensors there are, of which types."""
    types = ",".join("-" if t is None else str(t.dtype).removeprefix("torch.") for t in tensors)
    whole = all(step % 16 == 0 for steps in strides for step in steps)
    return {"rows": rounded(rows), "columns": columns, "types": types, "aligned": whole}


def _rows(tensors: list[Tensor]) -> tuple[list[tuple[int, int]], int] | None:
    """(stride of a batch, stride of a row) of each tensor, and the rows in a batch, which they have in common.

    Neighbouring dimensions are one where all the tensors allow it. None where more than two remain, or where columns do
    not lie side by side.
    """
    shape = tensors[0].shape
    if shape[-1] > 1 and any(t.stride(-1) != 1 for t in tensors):
        return None
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in tensors]
    for i, size in enumerate(shape[:-1]):
        if size == 1:
            continue
        steps = [t.stride(i) for t in tensors]
        if sizes and all(own[-1] == size * step for own, step in zip(strides, steps, strict=True)):
            sizes[-1] *= size
            for own, step in zip(strides, steps, strict=True):
                own[-1] = step
        else:
            sizes.append(size)
            for own, step in zip(strides, steps, strict=True):
                own.append(step)
    if len(sizes) > 2:
        return None
    return [tuple([0] * (2 - len(own)) + own) for own in strides], max(1, sizes[-1] if sizes else 1)
