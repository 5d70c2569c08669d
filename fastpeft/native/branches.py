"""The two branches of a frozen transformer block, each with its residual sum, as a handful of products.

    attention:  y = x + Wo attention(Wqkv LN(x); prompts)        MLP:  y = x + W2 act(W1 LN(x))

The residual stream is row-major, everything between is blocked: what one product writes, the next reads as it is. Kept
for the backward pass are x, two numbers a row of it, queries, keys, values and the derivative of the activation; with
`balanced` queries, keys and values are computed again, and the derivative has eight bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastpeft.native import blocked, low_rank
from fastpeft.native.attention import Heads, Shape, attention_backward, attention_forward
from fastpeft.native.bottleneck import FACTORS, Adapter, Bottleneck
from fastpeft.native.gemm import gemm
from fastpeft.native.layer_norm import affine_layer_norm_backward, layer_norm_backward
from fastpeft.native.low_rank import LowRank, Place
from fastpeft.native.memory import pool
from fastpeft.native.packs import Layer, Live
from fastpeft.native.trained import Trained, gradients
from fastpeft.ops.autocast import without_autocast


@dataclass(frozen=True)
class Attention:
    """A block's attention branch.

    Attributes:
        qkv: the fused projection, with the LayerNorm before it.
        out: the projection behind, with the LayerScale.
        places: of the low-rank terms beside each of the two.
        num_heads, head_dim, scale: as in the block's description.
        epsilon: of the LayerNorm.
        residual: add x to the branch.
        balanced: keep less, compute again.
        adapter: behind or beside the branch, which then has a residual; a parallel one not with low-rank terms of the
            same layers.
        trained: what each of the two layers hands over to be trained, with its LayerNorm's tensors, or None. Neither
            low-rank terms nor a parallel adapter stand beside a LayerNorm that is trained.
    """

    qkv: Layer | Live
    out: Layer | Live
    places: tuple[tuple[Place, ...], tuple[Place, ...]]
    num_heads: int
    head_dim: int
    scale: float
    epsilon: float
    residual: bool
    balanced: bool
    adapter: Adapter | None = None
    trained: tuple[Trained | None, Trained | None] = (None, None)


@dataclass(frozen=True)
class Mlp:
    """A block's MLP branch; attributes as of `Attention`, but that `epsilon` is None where no LayerNorm precedes it."""

    fc1: Layer | Live
    fc2: Layer | Live
    places: tuple[tuple[Place, ...], tuple[Place, ...]]
    activation: str
    epsilon: float | None
    residual: bool
    balanced: bool
    adapter: Adapter | None = None
    trained: tuple[Trained | None, Trained | None] = (None, None)


def attention_branch(
    x: Tensor,
    prompts: Tensor | None,
    prompt_k: Tensor | None,
    prompt_v: Tensor | None,
    plan: Attention,
    factors: Sequence[Tensor | None],
) -> Tensor:
    """The attention branch of x, differentiable in x, the prompts and the factors.

    Args:
        x: (B, N, d), bf16, or fp32 for a residual stream in fp32.
        prompts: rows like x's that are keys and values only, (p, d) shared by the batch or (B, p, d), or None; not
            beside low-rank terms of the fused projection, nor where that is trained.
        prompt_k: the same as keys: (H, p, D), (B, H, p, D), or None; rows of D without gaps.
        prompt_v: like prompt_k.
        plan: everything that is frozen.
        factors: A (r, in) and B (out, r) of every low-rank term, in the order of the plan's places; then the adapter's
            W_down (hidden, d), b_down (hidden,) or None, W_up (out, hidden), b_up (out,) or None; then what the layers
            hand over.

    Returns:
        (B, N, out), of x's dtype.
    """
    packed = None
    if prompt_k is not None:
        prompt_k, prompt_v = prompt_k.to(torch.bfloat16), prompt_v.to(torch.bfloat16)
    if prompts is not None:
        packed = _Packed(prompts.shape[-2], prompts.dim() == 2)
        prompt_k = _PromptKeysValues.apply(prompts, plan)
    return _AttentionBranch.apply(x, prompt_k, prompt_v, packed, plan, *factors)


def mlp_branch(x: Tensor, plan: Mlp, factors: Sequence[Tensor | None]) -> Tensor:
    """As `attention_branch`, for the MLP."""
    return _MlpBranch.apply(x, plan, *factors)


class _Packed(NamedTuple):
    """Prompts whose keys and values lie side by side in one blocked tensor."""

    count: int
    shared: bool

    def heads(self, t: Tensor, inner: int) -> tuple[Heads, Heads]:
        """Where the keys and the values lie; a shared prompt has one row for all samples."""
        rows = 0 if self.shared else self.count
        return Heads.blocked(t, rows), Heads.blocked(t, rows, inner)


def _pairs(factors: Sequence) -> list[tuple]:
    return list(zip(factors[::2], factors[1::2], strict=True))


class _Parts(NamedTuple):
    """What belongs to what, of the tensors besides x and the prompts, or of anything that there is one of for each.

    Attributes:
        pairs: for the factors of the first and of the second layer, in pairs.
        adapter: for the adapter's four, or nothing.
        trained: for what the first and the second layer hand over, or nothing.
    """

    pairs: tuple[list[tuple], list[tuple]]
    adapter: Sequence
    trained: tuple[Sequence, Sequence]


def _parts(plan: Attention | Mlp, all_of: Sequence) -> _Parts:
    first, second = (0 if t is None else t.count for t in plan.trained)
    end = len(all_of) - first - second
    adapter = FACTORS if plan.adapter else 0
    pairs, count = _pairs(all_of[: end - adapter]), len(plan.places[0])
    trained = all_of[end : end + first], all_of[end + first :]
    return _Parts((pairs[:count], pairs[count:]), all_of[end - adapter : end], trained)


def _beside(
    plan: Attention | Mlp, layers: tuple[Layer | Live, Layer | Live], parts: _Parts
) -> tuple[LowRank | None, LowRank | None, Bottleneck | None]:
    """The terms of both layers, and the adapter."""
    lows = (
        LowRank(layer, own, places) if own else None
        for layer, own, places in zip(layers, parts.pairs, plan.places, strict=True)
    )
    return (*lows, Bottleneck(plan.adapter, parts.adapter, layers[0]) if parts.adapter else None)


def _weights(trained: Trained | None, needed: Sequence[bool]) -> bool:
    """Whether a layer's weights are trained, whose gradients need what it read."""
    return trained is not None and any(needed[: len(trained.sizes)])


def _own_gradients(
    plan: Attention | Mlp,
    index: int,
    layer: Layer | Live,
    tensors: _Parts,
    needs: _Parts,
    dy: Tensor | None,
    a: Tensor | None,
    rows: int,
    statistics: Tensor | None = None,
    norm: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients of what a layer hands over; arguments as of `gradients`."""
    trained = plan.trained[index]
    if trained is None:
        return []
    if dy is None:
        return [None] * trained.count
    own = tensors.trained[index], needs.trained[index]
    return gradients(layer, trained, *own, dy, a, rows, statistics, norm)


def _norm_backward(
    layer: Layer | Live, gradient: Tensor, x: Tensor, statistics: Tensor, dsum: Tensor | None, needs_x: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of a LayerNorm's input with the sum's, and those of its weight and bias where they are trained."""
    dx = pool.empty(*x.shape, dtype=x.dtype) if needs_x else None
    if not layer.norm_trained:
        return layer_norm_backward(gradient, x, statistics, dsum, dx), None
    weight = torch.ones(x.shape[1]) if layer.column_scale is None else layer.column_scale
    return dx, affine_layer_norm_backward(gradient, x, statistics, weight, dsum, dx)


class _Kept(NamedTuple):
    """What an adapter keeps: its hidden units, the activation's derivative, and what it read, if that is not x."""

    hidden: Tensor | None = None
    slopes: Tensor | None = None
    read: Tensor | None = None


def _last(
    plan: Attention | Mlp,
    layer: Layer,
    low: LowRank | None,
    bottleneck: Bottleneck | None,
    a: Tensor,
    x: Tensor,
    keep: bool,
    beside: _Kept,
) -> tuple[Tensor, Tensor | None, _Kept]:
    """The branch's end: y = x + layer(a) with the adapter, a parallel one's `beside`; u; and what the adapter keeps."""
    rows, width = x.shape[0], layer.weight.shape[0]
    y = pool.empty(rows, width, dtype=x.dtype)
    other = x if plan.residual else None
    if bottleneck is None:
        return y, low_rank.forward(layer, low, a, y, rows, other=other), _Kept()
    if bottleneck.serial:
        f = blocked.empty(rows, width)
        u = low_rank.forward(layer, low, a, f, rows)
        return y, u, _Kept(*bottleneck.behind(f, other, y, rows, keep), f)
    riding = {"a2": beside.hidden, "extra": bottleneck.up(), "bias": bottleneck.up_bias()}
    return y, low_rank.forward(layer, None, a, y, rows, other=other, **riding), beside


def _first(bottleneck: Bottleneck | None, rows: int, keep: bool) -> tuple[_Kept, dict]:
    """What comes along with the first layer, a parallel adapter's hidden units; and what `gemm` is told of it."""
    if bottleneck is None or bottleneck.serial:
        return _Kept(), {}
    h, slopes, options = bottleneck.beside(rows, keep)
    return _Kept(h, slopes), options


def _last_backward(
    bottleneck: Bottleneck | None,
    kept: _Kept,
    dy: Tensor,
    x: Tensor,
    statistics: Tensor,
    before: bool,
    needed: Sequence[bool],
) -> tuple[Tensor | None, dict, list[Tensor | None]]:
    """The gradient of what the branch's last layer gave, if it is needed; what `gemm` is to be told besides for the
    gradient of the first layer's input; and the gradients of the adapter's factors."""
    if bottleneck is None:
        return dy, {}, []
    rows = dy.shape[0]
    read = kept.read if bottleneck.serial else x
    statistics = None if bottleneck.serial else statistics
    dz, df, found = bottleneck.backward(
        dy, read, kept.hidden, kept.slopes, rows, statistics, needed, bottleneck.serial and before
    )
    if bottleneck.serial:
        return df, {}, found
    return dy, {"a2": dz, "extra": bottleneck.backward_input()}, found


class _PromptKeysValues(torch.autograd.Function):
    """(prompts, plan) -> keys and values, blocked (rows, 2 H D); their gradient is blocked too."""

    @staticmethod
    def forward(ctx, prompts: Tensor, plan: Attention):
        flat = prompts.contiguous().view(-1, prompts.shape[-1])
        rows, inner = flat.shape[0], plan.num_heads * plan.head_dim
        weight, bias, _ = plan.qkv.tail(inner)
        statistics = torch.empty(2, rows)
        found = blocked.empty(rows, 2 * inner)
        gemm(flat, weight, found, rows, bias, statistics=statistics, epsilon=plan.epsilon)
        ctx.save_for_backward(flat, statistics)
        ctx.plan, ctx.shape = plan, prompts.shape
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx, gradient: Tensor):
        flat, statistics = ctx.saved_tensors
        rows = flat.shape[0]
        *_, weight = ctx.plan.qkv.tail(ctx.plan.num_heads * ctx.plan.head_dim)
        dxhat = gemm(gradient, weight, blocked.empty(rows, flat.shape[1]), rows)
        dx = layer_norm_backward(dxhat, flat, statistics, None, pool.empty(*flat.shape, dtype=flat.dtype))
        return dx.view(ctx.shape), None


class _AttentionBranch(torch.autograd.Function):
    """(x, prompt_k, prompt_v, packed, plan, *factors) -> y; x (B, N, d), prompts (H, p, D), (B, H, p, D) or None.

    With `packed`, prompt_k holds keys and values as `_PromptKeysValues` gives them.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        prompt_k: Tensor | None,
        prompt_v: Tensor | None,
        packed: _Packed | None,
        plan: Attention,
        *factors: Tensor,
    ):
        batch, tokens, width = x.shape
        rows, inner = batch * tokens, plan.num_heads * plan.head_dim
        flat = x.contiguous().view(rows, width)
        *lows, bottleneck = _beside(plan, (plan.qkv, plan.out), _parts(plan, factors))
        needed = any(ctx.needs_input_grad)
        statistics = torch.empty(2, rows)
        qkv = blocked.empty(rows, 3 * inner)
        beside, options = _first(bottleneck, rows, needed)
        options |= {"statistics": statistics, "epsilon": plan.epsilon}
        u = low_rank.forward(plan.qkv, lows[0], flat, qkv, rows, **options)
        attended = blocked.empty(rows, inner)
        shape, prompts = _prompts(plan, batch, tokens, prompt_k, prompt_v, packed)
        place = Heads.blocked(attended, tokens)
        lse = attention_forward(shape, *_heads(plan, qkv, tokens), *prompts, place, plan.scale)
        y, u_out, beside = _last(plan, plan.out, lows[1], bottleneck, attended, flat, needed, beside)
        if needed:
            kept = None if plan.balanced else qkv
            # Attention's own backward pass does not look at what it gave, the gradients of weights behind it do.
            reads = lows[1] is not None or _weights(plan.trained[1], _parts(plan, ctx.needs_input_grad[5:]).trained[1])
            given = attended if reads else None
            ctx.save_for_backward(flat, statistics, kept, given, lse, prompt_k, prompt_v, u, u_out, *beside, *factors)
            ctx.plan, ctx.packed, ctx.batch, ctx.tokens = plan, packed, batch, tokens
        return y.view(batch, tokens, y.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx, dy: Tensor):
        x, statistics, qkv, attended, lse, prompt_k, prompt_v, u, u_out, *rest = ctx.saved_tensors
        beside, factors = _Kept(*rest[:3]), rest[3:]
        plan, batch, tokens = ctx.plan, ctx.batch, ctx.tokens
        rows, inner = x.shape[0], plan.num_heads * plan.head_dim
        needs_x, needs_pk, needs_pv, _, _, *needs_factors = ctx.needs_input_grad
        needs, tensors = _parts(plan, needs_factors), _parts(plan, factors)
        *lows, bottleneck = _beside(plan, (plan.qkv, plan.out), tensors)
        flat = dy.contiguous().view(rows, dy.shape[-1])

        tokens_too = needs_x or bool(needs.pairs[0]) or any(needs.trained[0])
        before = tokens_too or needs_pk or needs_pv
        behind = before or bool(needs.pairs[1]) or any(needs.trained[1])
        df, riding, dadapter = _last_backward(bottleneck, beside, flat, x, statistics, behind, needs.adapter)
        dattended = blocked.empty(rows, inner) if before else None
        du = None if df is None else low_rank.backward(plan.out, lows[1], df, dattended, rows)
        dsecond = [] if du is None else lows[1].gradients(attended, u_out, df, du, rows, None, needs.pairs[1])
        last = _own_gradients(plan, 1, plan.out, tensors, needs, df, attended, rows)
        if not before:
            nothing = [None] * len(tensors.trained[0])
            return None, None, None, None, None, *dsecond, *dadapter, *nothing, *last

        if qkv is None:
            qkv = blocked.empty(rows, 3 * inner)
            low_rank.forward(plan.qkv, lows[0], x, qkv, rows, statistics=statistics, epsilon=plan.epsilon)
        dqkv = blocked.empty(rows, 3 * inner) if tokens_too else None
        dpk, dpv = _attend_backward(
            ctx, qkv, prompt_k, prompt_v, lse, Heads.blocked(dattended, tokens), dqkv, (needs_pk, needs_pv)
        )
        dx, dfirst, first = None, [], [None] * len(tensors.trained[0])
        if tokens_too:
            normed = needs_x or (plan.qkv.norm_trained and any(needs.trained[0][-2:]))
            dxhat = blocked.empty(rows, x.shape[1]) if normed else None
            du = low_rank.backward(plan.qkv, lows[0], dqkv, dxhat, rows, **riding)
            if du is not None:
                dfirst = lows[0].gradients(x, u, dqkv, du, rows, statistics, needs.pairs[0])
            dnorm = None
            if normed:
                dx, dnorm = _norm_backward(plan.qkv, dxhat, x, statistics, flat if plan.residual else None, needs_x)
                dx = None if dx is None else dx.view(batch, tokens, dx.shape[1])
            first = _own_gradients(plan, 0, plan.qkv, tensors, needs, dqkv, x, rows, statistics, dnorm)
        return dx, dpk, dpv, None, None, *dfirst, *dsecond, *dadapter, *first, *last


def _heads(plan: Attention, packed: Tensor, tokens: int) -> list[Heads]:
    """Queries, keys and values side by side in a blocked tensor."""
    inner = plan.num_heads * plan.head_dim
    return [Heads.blocked(packed, tokens, part * inner) for part in range(3)]


def _prompts(
    plan: Attention,
    batch: int,
    tokens: int,
    prompt_k: Tensor | None,
    prompt_v: Tensor | None,
    packed: _Packed | None,
) -> tuple[Shape, tuple[Heads, Heads]]:
    """Sizes, and where the prompts' keys and values lie."""
    count = packed.count if packed else 0 if prompt_k is None else prompt_k.shape[-2]
    shape = Shape(batch, plan.num_heads, tokens, tokens, count, plan.head_dim)
    if packed:
        return shape, packed.heads(prompt_k, plan.num_heads * plan.head_dim)
    return shape, (Heads.strided(prompt_k), Heads.strided(prompt_v))


def _attend_backward(
    ctx,
    qkv: Tensor,
    prompt_k: Tensor | None,
    prompt_v: Tensor | None,
    lse: Tensor,
    dout: Heads,
    dqkv: Tensor | None,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Fill dqkv, if it is there, and return gradients like prompt_k and prompt_v."""
    plan, packed, tokens = ctx.plan, ctx.packed, ctx.tokens
    shape, prompts = _prompts(plan, ctx.batch, tokens, prompt_k, prompt_v, packed)
    gradients = [Heads()] * 3 if dqkv is None else _heads(plan, dqkv, tokens)
    whole = places = None
    if packed and needs[0]:
        needs = (True, True)
        if not packed.shared:
            whole = pool.empty(*prompt_k.shape, dtype=prompt_k.dtype)
            places = packed.heads(whole, shape.heads * shape.dim)
    found = attention_backward(
        shape, *_heads(plan, qkv, tokens), *prompts, lse, plan.scale, dout, *gradients, needs, places
    )
    if packed and needs[0]:
        if whole is None:
            rows = [t.transpose(0, 1).flatten(1) for t in found]
            whole = blocked.from_rows(torch.cat(rows, 1).to(prompt_k.dtype))
        return whole, None
    return tuple(None if g is None else g.to(t.dtype) for g, t in zip(found, (prompt_k, prompt_v), strict=True))


class _MlpBranch(torch.autograd.Function):
    """(x, plan, *factors) -> y; x (B, N, d)."""

    @staticmethod
    def forward(ctx, x: Tensor, plan: Mlp, *factors: Tensor):
        flat = x.contiguous().view(-1, x.shape[-1])
        rows, hidden = flat.shape[0], plan.fc1.weight.shape[0]
        *lows, bottleneck = _beside(plan, (plan.fc1, plan.fc2), _parts(plan, factors))
        needed, needs = any(ctx.needs_input_grad), _parts(plan, ctx.needs_input_grad[2:])
        normed = plan.epsilon is not None
        statistics = torch.empty(2, rows) if normed else None
        kept = None
        if ctx.needs_input_grad[0] or (lows[0] is not None and needed) or any(needs.trained[0]):
            kept = blocked.empty(rows, hidden, torch.uint8 if plan.balanced else torch.bfloat16)
        a = blocked.empty(rows, hidden)
        beside, options = _first(bottleneck, rows, needed)
        options |= {"statistics": statistics, "epsilon": plan.epsilon or 0.0}
        options |= {"activation": plan.activation, "kept": kept}
        u1 = low_rank.forward(plan.fc1, lows[0], flat, a, rows, **options)
        y, u2, beside = _last(plan, plan.fc2, lows[1], bottleneck, a, flat, needed, beside)
        if needed:
            given = a if lows[1] is not None or _weights(plan.trained[1], needs.trained[1]) else None
            # Without a LayerNorm only factors and weights look at x again.
            parallel = bottleneck is not None and not bottleneck.serial
            reads = normed or lows[0] is not None or parallel or plan.trained[0] is not None
            read = flat if reads else None
            ctx.save_for_backward(read, statistics, kept, given, u1, u2, *beside, *factors)
            ctx.plan, ctx.shape = plan, x.shape
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    @without_autocast
    def backward(ctx, dy: Tensor):
        x, statistics, kept, a, u1, u2, *rest = ctx.saved_tensors
        beside, factors = _Kept(*rest[:3]), rest[3:]
        plan, rows = ctx.plan, ctx.shape[:-1].numel()
        needs_x, _, *needs_factors = ctx.needs_input_grad
        needs, tensors = _parts(plan, needs_factors), _parts(plan, factors)
        *lows, bottleneck = _beside(plan, (plan.fc1, plan.fc2), tensors)
        flat = dy.contiguous().view(rows, dy.shape[-1])

        before = needs_x or bool(needs.pairs[0]) or any(needs.trained[0])
        behind = before or bool(needs.pairs[1]) or any(needs.trained[1])
        df, riding, dadapter = _last_backward(bottleneck, beside, flat, x, statistics, behind, needs.adapter)
        dz = blocked.empty(rows, plan.fc1.weight.shape[0]) if before else None
        du = None
        if df is not None:
            du = low_rank.backward(plan.fc2, lows[1], df, dz, rows, **({"kept": kept} if before else {}))
        dsecond = [] if du is None else lows[1].gradients(a, u2, df, du, rows, None, needs.pairs[1])
        last = _own_gradients(plan, 1, plan.fc2, tensors, needs, df, a, rows)
        dx, dfirst, first = None, [], [None] * len(tensors.trained[0])
        if before:
            normed = needs_x or (plan.fc1.norm_trained and any(needs.trained[0][-2:]))
            dxhat = None
            if plan.epsilon is None and needs_x:
                dxhat = pool.empty(rows, ctx.shape[-1], dtype=torch.bfloat16)
                riding["other"] = flat if plan.residual else None
            elif normed:
                dxhat = blocked.empty(rows, ctx.shape[-1])
            du = low_rank.backward(plan.fc1, lows[0], dz, dxhat, rows, **riding)
            if du is not None:
                dfirst = lows[0].gradients(x, u1, dz, du, rows, statistics, needs.pairs[0])
            dnorm = None
            if plan.epsilon is None:
                dx = None if dxhat is None else dxhat.view(ctx.shape)
            elif normed:
                dx, dnorm = _norm_backward(plan.fc1, dxhat, x, statistics, flat if plan.residual else None, needs_x)
                dx = None if dx is None else dx.view(ctx.shape)
            first = _own_gradients(plan, 0, plan.fc1, tensors, needs, dz, x, rows, statistics, dnorm)
        return dx, None, *dfirst, *dsecond, *dadapter, *first, *last
