"""Rows that a batch shares, dropped for every sample by a mask of its own.

out[s] = x * mask[s],    dx = sum over s of dout[s] * mask[s]
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft import _native
from fastpeft.ops.choose import transformed
from fastpeft.ops.dropout_mask import dropout_mask, mask_words


def dropped_rows(x: Tensor, seed: Tensor, step: Tensor, site: int, samples: tuple[int, int], p: float) -> Tensor:
    """Drop elements of x for each sample.

    Args:
        x: (p, d), any float type.
        seed, step, site, samples, p: as of `dropout_mask`.

    Returns:
        (count, p, d), of x's dtype.
    """
    if _runs_natively(x):
        return _Dropped.apply(x, *mask_words(seed, step, site, samples, x.numel()), p)
    mask = dropout_mask(seed, step, site, samples, x.numel(), p, x.dtype)
    return x * mask.view(-1, *x.shape)


def _runs_natively(x: Tensor) -> bool:
    """The same numbers either way: where the native library is there, it makes no mask."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or transformed() or _native.library() is None:
        return False
    from fastpeft.native.vector import dropout

    return not dropout.reasons(x)


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, row_words: Tensor, column_words: Tensor, p: float):
        from fastpeft.native.vector import dropout

        ctx.save_for_backward(row_words, column_words)
        ctx.p = p
        return dropout.forward(x, row_words, column_words, p)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout: Tensor):
        from fastpeft.native.vector import dropout

        return dropout.backward(dout, *ctx.saved_tensors, ctx.p).to(dout.dtype), None, None, None
