"""Attention of few queries to a long memory, without the memory's keys and values.

    s_h = q_h (W_k,h m^T + b_k,h 1^T) = (q_h W_k,h) m^T + const    a constant of a row changes no probability
    y_h = P_h (m W_v,h^T + 1 b_v,h^T) = (P_h m) W_v,h^T + b_v,h    the rows of P_h sum to one

Keys and values are 4 N d^2 operations, whoever reads them, and stay for the backward pass. Taken to the queries' side,
the two weights meet M rows instead of N, and scores and sums run over the memory itself, which all layers share:
4 M H N d operations. That is less for M < d / H queries, and with a backward pass, in which scores are computed again,
for about half as many (`pays`). The same function, rounded at other places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpeft.ops.lora_linear import LowRankTerm
from fastpeft.ops.prompt_attention import prompt_attention


def pays(queries: int, heads: int, width: int, needs_memory: bool, needs_queries: bool) -> bool:
    """Whether there are few enough queries, by the operations of forward and backward passes.

    Keys and values are 2 products of N d^2, and 2 more where the memory's gradient is needed. Here 2 products of
    M H N d are the forward pass; the backward pass computes the scores again, and the gradients of P, of q and, where
    it is needed, of the memory: 3 more, or 5.

    Args:
        queries: M, of a sample.
        heads: H.
        width: d, of the memory.
        needs_memory: its gradient is needed.
        needs_queries: theirs is.
    """
    if needs_memory:
        return 7 * queries * heads < 4 * width
    return (5 if needs_queries else 2) * queries * heads < 2 * width


def memory_attention(
    q: Tensor,
    memory: Tensor,
    weight_k: Tensor,
    weight_v: Tensor,
    bias_v: Tensor | None,
    terms_k: Sequence[LowRankTerm],
    terms_v: Sequence[LowRankTerm],
    scale: float,
    attn_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attend to a memory.

    Args:
        q: (B, H, M, D).
        memory: (B, N, d).
        weight_k: (H D, d). A bias of the keys makes no difference.
        weight_v: (H D, d).
        bias_v: (H D,) or None.
        terms_k: low-rank terms of the keys, over all their columns, without dropout.
        terms_v: of the values.
        scale: of the scores.
        attn_mask: as of `prompt_attention`, the same for all queries of a sample: (B, 1, 1, N).
        lengths: as of `prompt_attention`.
        backend: of `prompt_attention`.

    Returns:
        (B, M, H D).
    """
    batch, heads, count, dim = q.shape
    width = memory.shape[-1]
    rows = q.permute(1, 0, 2, 3).reshape(heads, batch * count, dim)
    # The weights may be of another type than the states, fp32 where these come out of autocast.
    asked = torch.bmm(rows, weight_k.to(q.dtype).view(heads, dim, width))
    for term in terms_k:
        b = term.b.to(q.dtype).view(heads, dim, -1)
        asked = asked + (torch.bmm(rows, b) * term.scale) @ term.a.to(q.dtype)
    asked = asked.view(heads, batch, count, width).transpose(0, 1).reshape(batch, 1, heads * count, width)
    seen = memory[:, None]
    found = prompt_attention(asked, seen, seen, attn_mask=attn_mask, scale=scale, lengths=lengths, backend=backend)
    found = found.view(batch, heads, count, width).transpose(0, 1).reshape(heads, batch * count, width)
    y = torch.bmm(found, weight_v.to(found.dtype).view(heads, dim, width).transpose(1, 2))
    for term in terms_v:
        b = term.b.to(q.dtype).view(heads, dim, -1)
        y = y + torch.bmm(found @ term.a.to(q.dtype).t() * term.scale, b.transpose(1, 2))
    y = y.view(heads, batch, count, dim).permute(1, 2, 0, 3).reshape(batch, count, heads * dim)
    return y if bias_v is None else y + bias_v.to(y.dtype)


def reference(
    q: Tensor,
    memory: Tensor,
    weight_k: Tensor,
    weight_v: Tensor,
    bias_v: Tensor | None,
    terms_k: Sequence[LowRankTerm],
    terms_v: Sequence[LowRankTerm],
    scale: float,
    attn_mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """The equation in plain PyTorch, with keys and values. Arguments as of `memory_attention`."""
    batch, heads, _count, dim = q.shape

    def project(weight: Tensor, terms: Sequence[LowRankTerm]) -> Tensor:
        weight = weight + sum(term.scale * term.b.to(weight.dtype) @ term.a.to(weight.dtype) for term in terms)
        return (memory @ weight.t()).view(batch, -1, heads, dim).transpose(1, 2)

    scores = scale * q @ project(weight_k, terms_k).transpose(-1, -2)
    if lengths is not None:
        attn_mask = torch.arange(memory.shape[1]) < lengths[:, None, None, None]
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    y = (scores.softmax(-1) @ project(weight_v, terms_v)).transpose(1, 2).flatten(2)
    return y if bias_v is None else y + bias_v
