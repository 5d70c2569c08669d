"""The post-LayerNorm block that runs, with cross-attention, masks and cached keys.

    x <- LN(x + attn(x, [x; p])),   x <- LN(x + attn(x, memory)),   x <- LN(x + ffn(x))

Rows that a method inserts before such a block, p, and whose outputs nobody reads, are keys and values of the first
attention only: no query, no output projection, no cross-attention and no FFN, and one projection for the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from fastpeft.engine import packed
from fastpeft.engine.block import BlockRun
from fastpeft.engine.branches import join
from fastpeft.engine.description import child
from fastpeft.engine.extensions import KeyValues, Noise
from fastpeft.engine.hooks import call_under_hooks
from fastpeft.engine.linear import read
from fastpeft.ops.activation import FUNCTIONS
from fastpeft.ops.layer_norm import add_layer_norm
from fastpeft.ops.mlp import mlp
from fastpeft.ops.prompt_attention import prompt_attention


class KeyCache(Protocol):
    """Keys and values that a causal block keeps from call to call.

    Attributes:
        memory_k, memory_v: of the memory, (B, H, N, D), or None before the first call. Of fewer samples than x has,
            each belongs to as many of them that lie side by side.
    """

    memory_k: Tensor | None
    memory_v: Tensor | None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of new rows, (B, H, n, D) each; all there are."""
        ...


def run_post_norm(
    block: nn.Module,
    x: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    memory: Tensor | None = None,
    memory_mask: Tensor | None = None,
    cache: KeyCache | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """Run an adopted post-LayerNorm block.

    Args:
        block: the module; its `BlockState` says what it is.
        x: (B, M, d); with a cache the new rows only.
        mask: bool (B, N), which of the keys, cached ones first, are real; None for all.
        causal: row i of x sees the cached keys and rows 0..i, and everything that the block inserts.
        memory: (B, Nm, d) for cross-attention.
        memory_mask: bool (B, Nm); None for all.
        cache: keys and values of earlier rows and of the memory; grows.
        noise: where dropout masks come from; the host's present masks if None.

    Returns:
        (B, M, d).
    """
    return PostNormRun(block, noise).run(x, mask, causal, memory, memory_mask, cache)


class PostNormRun(BlockRun):
    """One forward of one post-LayerNorm block."""

    def run(
        self,
        x: Tensor,
        mask: Tensor | None,
        causal: bool,
        memory: Tensor | None,
        memory_mask: Tensor | None,
        cache: KeyCache | None,
    ) -> Tensor:
        """Arguments as of `run_post_norm`."""
        y = self._self_attention(x, mask, causal, cache)
        x = self._close("attn_out", "norm1", "proj_drop", "o", "attn", y, x)
        if self.spec.cross:
            y = self._cross_attention(x, memory, memory_mask, cache)
            x = self._close("cross_out", "cross_norm", "cross_proj_drop", "cross_o", "cross", y, x)
        return self._feed_forward(x)

    def prompt_keys_values(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (..., H, p, D) of inserted rows (..., p, d), which no LayerNorm precedes."""
        return self._prompt_keys_values(rows)

    def _self_attention(self, x: Tensor, mask: Tensor | None, causal: bool, cache: KeyCache | None) -> Tensor:
        own, count = self._prompt_rows(x), x.shape[1]
        if own is not None and self.index is not None:
            own, self.index = own[self.index], None
        if own is not None and self._together():
            rows = torch.cat((x, own.expand(x.shape[0], -1, -1)), 1)
            q, k, v = (self._heads(t) for t in self._qkv(rows, 0, 3))
            extra = [(k[..., count:, :], v[..., count:, :])]
            q, k, v = (t[..., :count, :] for t in (q, k, v))
        else:
            q, k, v = (self._heads(t) for t in packed.rows(self, ("q", "k", "v"), x) or self._qkv(x, 0, 3))
            extra = [] if own is None else [self._prompt_keys_values(own)]
        for extension in self.extensions:
            if isinstance(extension, KeyValues):
                extra.append(tuple(self._heads(t.to(k.dtype)) for t in extension.keys_values()))
        if cache is not None:
            k, v = cache.extend(k, v)
        square = causal and mask is None and k.shape[2] == count
        lengths = None if causal else lengths_of(mask)
        seen = None if square or lengths is not None else visible(mask, causal, count, k.shape[2], x.device)
        return self._attend(q, k, v, join(extra, x.shape[0]), seen, square, self.attn_drop, lengths)

    def _cross_attention(self, x: Tensor, memory: Tensor, mask: Tensor | None, cache: KeyCache | None) -> Tensor:
        (q,) = packed.rows(self, ("cross_q",), x) or [self._linear("cross_q", x)]
        drop = child(self.block, self.spec.inner["cross_drop"])
        lengths, dropout = lengths_of(mask), drop.p if drop.training else 0.0
        seen = None if lengths is not None else visible(mask)
        if cache is None and not dropout:
            y = packed.attend_to_memory(self, self._heads(q), memory, seen, lengths)
            if y is not None:
                return y
        k, v = _of_memory(cache, lambda: self._memory_keys_values(memory))
        # To a memory that several samples share, they are queries of one.
        q = self._heads(q.reshape(k.shape[0], -1, q.shape[-1]))
        y = self._attend(q, k, v, (None, None), seen, False, dropout, lengths)
        return y.reshape(*x.shape[:2], y.shape[-1])

    def _memory_keys_values(self, memory: Tensor) -> list[Tensor]:
        roles = ("cross_k", "cross_v")
        found = packed.rows(self, roles, memory) or [self._linear(role, memory) for role in roles]
        return [self._heads(t) for t in found]

    def _attend(
        self, q, k, v, prompts, seen: Tensor | None, causal: bool, dropout: float, lengths: Tensor | None
    ) -> Tensor:
        options = {"dropout": dropout, "lengths": lengths, "backend": self.backends["prompt_attention"]}
        y = prompt_attention(q, k, v, *prompts, seen, causal, self.spec.scale, **options)
        return y.transpose(1, 2).flatten(2)

    def _together(self) -> bool:
        """Whether inserted rows must go through the projections together with x.

        A dropout mask belongs to one row of one sample, and a layer that the engine cannot look into may do anything.
        """
        if any(e.training and e.draws for e in self.low_ranks):
            return True
        return any(read(child(self.block, self.spec.roles[role].path)) is None for role in "kv")

    def _close(self, container: str, norm: str, drop: str, role: str, location: str, y: Tensor, x: Tensor) -> Tensor:
        """LN(x + drop(W y)), with the adapters of the location, under the container's hooks."""

        def function(y: Tensor, x: Tensor) -> Tensor:
            total = packed.behind(self, role, location, y, x) if self.idle(drop) else None
            if total is not None:
                return self._norm(norm, total)
            branch = self._adapt(location, self._linear(role, y), x)
            return self._sum_and_norm(norm, x, self._inner(drop, branch))

        return self._hooked_call(container, function, y, x)

    def _sum_and_norm(self, role: str, x: Tensor, branch: Tensor) -> Tensor:
        norm = self._fusable_norm(role)
        if norm is None:
            return self._inner(role, x + branch)
        return add_layer_norm(x, branch, None, norm.weight, norm.bias, norm.eps, self.backends["layer_norm"])[1]

    def _feed_forward(self, x: Tensor) -> Tensor:
        total = packed.feed_forward(self, x) if self.idle("drop2") else None
        if total is not None:
            return self._norm("norm2", total)
        weights = self._frozen_mlp()
        if weights is not None:
            branch = mlp(x, *weights, self.spec.activation, self._keep(x), self.backends["mlp"])
            branch = self._inner("drop2", self._adapt("ffn", branch, x))
            return self._sum_and_norm("norm2", x, branch)
        act = FUNCTIONS[self.spec.activation]
        h = self._hooked_call("hidden", lambda x: act(self._linear("fc1", x)), x)
        return self._close("ffn_out", "norm2", "drop2", "fc2", "ffn", h, x)

    def _hooked_call(self, container: str, function: Callable, *args: Tensor) -> Tensor:
        if not self.hooked:
            return function(*args)
        return call_under_hooks(child(self.block, self.spec.containers[container]), function, *args)


def block_run(block: nn.Module, noise: Noise | None = None) -> BlockRun:
    """A forward of an adopted block, as its description says what it is."""
    kind = PostNormRun if block.fastpeft_block.spec.post_norm else BlockRun
    return kind(block, noise)


def _of_memory(cache: KeyCache | None, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Keys and values of the memory, computed once if there is a cache."""
    if cache is None:
        return compute()
    if cache.memory_k is None:
        cache.memory_k, cache.memory_v = compute()
    return [cache.memory_k, cache.memory_v]


def lengths_of(mask: Tensor | None) -> Tensor | None:
    """How many keys of each sample are real, int32 (B,), if all that are not stand behind those that are.

    Only looked for on the CPU, where looking is free; all layers that are given one mask share the answer.
    """
    if mask is None or mask.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    # A tensor of inference mode has no version that would tell of a change: it is looked at every time.
    remembers = not mask.is_inference()
    known = getattr(mask, "_fastpeft_lengths", None) if remembers else None
    if known is not None and known[0] == mask._version:
        return known[1]
    lengths = mask.sum(1, dtype=torch.int32)
    padded = bool((lengths > 0).all()) and torch.equal(mask, torch.arange(mask.shape[1]) < lengths[:, None])
    found = lengths if padded else None
    if remembers:
        mask._fastpeft_lengths = (mask._version, found)
    return found


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
