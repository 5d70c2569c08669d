"""Dropout masks as a pure function of counters.

    keep[s, i] = hash(seed, step, site, sample s, element i) >= p * 2^32
    mask[s, i] = keep[s, i] / (1 - p)

Nothing is stored: a recomputed block, a resumed run and another device draw the same mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
_WORD = 0xFFFFFFFF


def _mix64(z: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, where `>>` would otherwise drag the sign along."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _MIX[0]
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _MIX[1]
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def _word(z: Tensor) -> Tensor:
    """The lower 32 bits of an int64 as int32."""
    # Sign extension by arithmetic: Inductor's CPU code crashes on the masks of a comparison of int64 here.
    return (((z & _WORD) ^ (1 << 31)) - (1 << 31)).to(torch.int32)


def _key(seed: Tensor, step: Tensor, site: int) -> Tensor:
    return _mix64(_mix64(seed.to(step.device) + _GOLDEN) + step * _GOLDEN + site)


def _rows(key: Tensor, first: int, count: int) -> Tensor:
    rows = torch.arange(first, first + count, device=key.device, dtype=torch.int64)
    return _word(_mix64((key ^ _MIX[0]) + rows * _GOLDEN))


def _columns(key: Tensor, count: int) -> Tensor:
    return _word(_mix64(key + torch.arange(count, device=key.device, dtype=torch.int64) * _GOLDEN))


@torch.no_grad()
def dropout_mask(
    seed: Tensor, step: Tensor, site: int, samples: tuple[int, int] | None, size: int, p: float, dtype: torch.dtype
) -> Tensor:
    """Multipliers of dropout with probability p.

    Args:
        seed: int64 scalar.
        step: int64 scalar.
        site: number of the place in the model that draws (layer and role).
        samples: (first, count) of the samples' positions in the global batch; None for one mask that all share.
        size: elements a sample.
        p: probability of zero, 0 <= p < 1.
        dtype: of the result.

    Returns:
        (count, size), or (size,) if all samples share it; every element is 0 or 1 / (1 - p).

    Raises:
        ValueError: p is outside of [0, 1).
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout probability must be in [0, 1), got {p}")
    key = _key(seed, step, site)
    columns = _columns(key, size)
    z = columns.clone() if samples is None else _rows(key, *samples)[:, None] ^ columns[None, :]
    return _kept(z, p).to(dtype).mul_(1.0 / (1.0 - p))


def _kept(z: Tensor, p: float) -> Tensor:
    """Whether each of the int32 words, which are overwritten, lies in the share 1 - p that is kept."""
    # Two rounds of a 32-bit finaliser on words that are already well mixed each; in place, the mask may be large.
    z.mul_(0x7FEB352D)
    z.bitwise_xor_((z >> 15) & 0x1FFFF)
    z.mul_(0x846CA68B - (1 << 32))
    z.bitwise_xor_((z >> 16) & 0xFFFF)
    return z >= round(p * (1 << 32)) - (1 << 31)


def keep_by_words(rows: Tensor, columns: Tensor, p: float) -> Tensor:
    """The mask of row and column words: boolean, True where kept.

    Args:
        rows: int32, broadcastable with columns.
        columns: int32.
        p: probability of False.
    """
    return _kept(rows ^ columns, p)


@torch.no_grad()
def mask_words(seed: Tensor, step: Tensor, site: int, samples: tuple[int, int], size: int) -> tuple[Tensor, Tensor]:
    """Words whose mask, by `keep_by_words`, is that of `dropout_mask`: int32 (count,) and (size,)."""
    key = _key(seed, step, site)
    return _rows(key, *samples), _columns(key, size)


@torch.no_grad()
def attention_words(
    seed: Tensor, step: Tensor, site: int, samples: tuple[int, int], heads: int, queries: int, keys: int
) -> tuple[Tensor, Tensor]:
    """Words whose mask is that of `dropout_mask` over rows (sample, head, query) of `keys` elements.

    Args:
        seed, step, site: as of `dropout_mask`.
        samples: (first, count) of the samples' positions in the global batch.
        heads, queries, keys: shape of a sample's probabilities.

    Returns:
        int32 (count, heads, queries) and (keys,).
    """
    key = _key(seed, step, site)
    first, count = samples
    rows = _rows(key, first * heads * queries, count * heads * queries)
    return rows.view(count, heads, queries), _columns(key, keys)
