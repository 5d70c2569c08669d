"""BERT's layers as mPLUG stacks them, with the names of its state dicts.

x <- LN(x + drop(W_o attn(x, x)))
x <- LN(x + drop(W_o attn(x, memory)))        only with cross-attention
x <- LN(x + drop(W_2 GELU(W_1 x)))
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpeft.models.mplug.config import MPlugConfig
from fastpeft.models.mplug.stream import LayerCache


class Embeddings(nn.Module):
    """LN(word + type 0 + position), and dropout."""

    def __init__(self, config: MPlugConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.width)
        self.position_embeddings = nn.Embedding(config.max_positions, config.width)
        self.token_type_embeddings = nn.Embedding(2, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, ids: Tensor, first: int = 0) -> Tensor:
        """ids (B, L), of which the first stands at position `first` -> (B, L, D)."""
        positions = self.position_embeddings.weight[first : first + ids.shape[1]]
        x = self.word_embeddings(ids) + self.token_type_embeddings.weight[0] + positions
        # Words that are trained (with a tied output layer) are fp32 where everything frozen is not.
        return self.dropout(self.LayerNorm(x.to(self.LayerNorm.weight.dtype)))


class SelfAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v, with the three projections."""

    def __init__(self, config: MPlugConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.query, self.key, self.value = (nn.Linear(config.width, config.width) for _ in range(3))
        self.dropout = nn.Dropout(config.attention_dropout)

    def heads(self, rows: Tensor) -> Tensor:
        """(B, N, H D) -> (B, H, N, D)."""
        return rows.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, N, D) each."""
        return self.heads(self.key(x)), self.heads(self.value(x))

    def attend(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The rows of x (B, M, H D) attend; mask (B or 1, 1, M or 1, N), True where they may.

        k and v may have fewer samples, each of which belongs to as many of x that lie side by side: a memory's beams.
        """
        dropout = self.dropout.p if self.training else 0.0
        q = self.query(x)
        q = self.heads(q.reshape(k.shape[0], -1, q.shape[-1]))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return y.transpose(1, 2).reshape(*x.shape[:2], -1)


class Output(nn.Module):
    """LN(x + drop(W y))."""

    def __init__(self, config: MPlugConfig, in_features: int):
        super().__init__()
        self.dense = nn.Linear(in_features, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """y (B, N, in_features) of x (B, N, D) -> (B, N, D)."""
        return self.LayerNorm(x + self.dropout(self.dense(y)))


class Attention(nn.Module):
    """Attention with what follows it."""

    def __init__(self, config: MPlugConfig):
        super().__init__()
        self.self = SelfAttention(config)
        self.output = Output(config, config.width)


class Intermediate(nn.Module):
    """GELU(W x)."""

    def __init__(self, config: MPlugConfig):
        super().__init__()
        self.dense = nn.Linear(config.width, config.intermediate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, hidden)."""
        return F.gelu(self.dense(x))


class BertLayer(nn.Module):
    """One layer; with `cross`, it also attends to a memory."""

    def __init__(self, config: MPlugConfig, cross: bool):
        super().__init__()
        self.attention = Attention(config)
        self.crossattention = Attention(config) if cross else None
        self.intermediate = Intermediate(config)
        self.output = Output(config, config.intermediate)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Run the layer.

        Args:
            x: (B, M, D); with a cache the new rows only.
            mask: bool (B, N), which of the N keys, cached ones first, are real; None for all.
            causal: row i of x sees the cached keys and rows 0..i.
            memory: (B, Nm, D) for cross-attention.
            memory_mask: bool (B, Nm); None for all.
            cache: keys and values of earlier rows and of the memory; grows.

        Returns:
            (B, M, D).
        """
        attention = self.attention.self
        k, v = attention.keys_values(x)
        if cache is not None:
            k, v = cache.extend(k, v)
        x = self.attention.output(attention.attend(x, k, v, visible(mask, causal, x.shape[1], k.shape[2], x.device)), x)
        if self.crossattention is not None:
            attention = self.crossattention.self
            k, v = memory_keys_values(cache, lambda: attention.keys_values(memory))
            x = self.crossattention.output(attention.attend(x, k, v, visible(memory_mask)), x)
        return self.output(self.intermediate(x), x)


def memory_keys_values(cache: LayerCache | None, compute) -> tuple[Tensor, Tensor]:
    """Keys and values of the memory, computed once if there is a cache."""
    if cache is None:
        return compute()
    if cache.memory_k is None:
        cache.memory_k, cache.memory_v = compute()
    return cache.memory_k, cache.memory_v


def visible(
    mask: Tensor | None, causal: bool = False, rows: int = 0, keys: int = 0, device: torch.device | None = None
) -> Tensor | None:
    """Which keys a row may see: bool (B or 1, 1, rows or 1, keys), or None for all.

    Args:
        mask: bool (B, keys), which keys are real; None for all.
        causal: the last `rows` of the keys belong to the rows, and a row sees no later one.
        rows: number of rows; only if causal.
        keys: number of keys; only if causal.
        device: of the result; only if causal.
    """
    found = None if mask is None else mask[:, None, None, :]
    if causal and rows > 1:
        order = torch.ones(rows, keys, dtype=torch.bool, device=device).tril(keys - rows)
        found = order[None, None] if found is None else found & order
    return found
