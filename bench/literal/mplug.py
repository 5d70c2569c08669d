"""mPLUG with the study's five methods as its equations say them.

prompt           F([p; x])                                       before the embeddings of text encoder and decoder
prefix           f_i([p_i; x]), the rows of p_i dropped again    in every block
LoRA             softmax((x (W_q + Phi_1)) (g (W_k + Phi_2))^T) g W_v,   Phi = A^T B^T
serial           LN(x + A(f(x)))                                 behind attention and FFN
parallel         LN(x + A(x) + f(x))                             beside attention and FFN

Attention is two products with a softmax between them, as BERT's original code computes it; masks are large negative
numbers that are added to the scores. In the image tower a method is what it is in any vision transformer
(`bench.literal.vit`).
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.literal.adapters import Bottleneck
from bench.literal.build import apply
from bench.literal.masters import master_copy_of
from fastpeft.models.mplug import MPlug, Stream
from fastpeft.models.mplug.layers import Attention, BertLayer

_STACKS = {"text": "text_encoder.encoder", "fusion": "fusion_encoder.encoder", "decoder": "text_decoder.bert.encoder"}
_FAR = -1e9


def apply_to_mplug(model: MPlug, method: Any) -> MPlug:
    """Freeze a plain model and give it a literal method, in place; tensors are named as the library names its own."""
    model.requires_grad_(False)
    model.__class__ = LiteralMPlug
    for _, layer in _layers(model, tuple(_STACKS)):
        layer.__class__ = LiteralLayer
    parts = () if method is None else method.parts()
    for part in parts:
        stacks = part.stacks or tuple(_STACKS)
        for stack, layer in _layers(model, tuple(stack for stack in stacks if stack != "image")):
            first = layer is _layers(model, (stack,))[0][1]
            _ADD[part.name](layer, part, first and stack != "fusion")
    of_images = [part for part in parts if part.stacks is not None and "image" in part.stacks]
    if of_images:
        apply(model.visual_encoder, functools.reduce(operator.add, of_images), train_head=False)
    return model


def _layers(model: MPlug, stacks: tuple[str, ...]) -> list[tuple[str, BertLayer]]:
    return [(stack, layer) for stack in stacks for _, layer in model.get_submodule(_STACKS[stack]).numbered()]


class LiteralMPlug(MPlug):
    """Its stacks take prompts before their input."""

    def _enter(self, stack: str, text: Stream) -> Stream:
        layer = _layers(self, (stack,))[0][1]
        if "prompt_tuning" not in layer._modules:
            return text
        prompts = layer.prompt_tuning.prompts.to(text.states.dtype).expand(len(text.states), -1, -1)
        mask = text.mask
        if mask is not None:
            mask = torch.cat((mask.new_ones(prompts.shape[:2]), mask), 1)
        return Stream(torch.cat((prompts, text.states), 1), mask)


class LiteralLayer(BertLayer):
    """All rows through everything."""

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        memory: Tensor | None = None,
        memory_mask: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """As `BertLayer.forward`; there is no cache."""
        own = self._modules.get("prefix")
        count = 0 if own is None else own.prompts.shape[0]
        if own is not None:
            x = torch.cat((own.prompts.to(x.dtype).expand(len(x), -1, -1), x), 1)
        scores = _hidden(mask, count, x) + (_future(x.shape[1], count, x) if causal else 0.0)
        h = self._branch("attn", "", self.attention, x, x, scores)
        if self.crossattention is not None:
            h = self._branch("cross", "cross_", self.crossattention, h, memory, _hidden(memory_mask, 0, memory))
        u = self.output.dense(F.gelu(self.intermediate.dense(h)))
        h = self.output.LayerNorm(h + self.output.dropout(self._adapted("ffn", u, h)))
        return h[:, count:]

    def _branch(self, location: str, prefix: str, part: Attention, x: Tensor, g: Tensor, scores: Tensor) -> Tensor:
        attention = part.self
        q = attention.heads(attention.query(x) + self._low_rank(f"{prefix}q", x))
        k = attention.heads(attention.key(g) + self._low_rank(f"{prefix}k", g))
        v = attention.heads(attention.value(g) + self._low_rank(f"{prefix}v", g))
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + scores).softmax(-1)
        y = (attention.dropout(weights) @ v).transpose(1, 2).flatten(2)
        u = part.output.dense(y) + self._low_rank(f"{prefix}o", y)
        return part.output.LayerNorm(x + part.output.dropout(self._adapted(location, u, x)))

    def _low_rank(self, role: str, x: Tensor) -> Tensor | float:
        lora = self._modules.get("lora")
        if lora is None or role not in lora:
            return 0.0
        return lora[role](x)

    def _adapted(self, location: str, u: Tensor, x: Tensor) -> Tensor:
        for name in ("serial_adapter", "parallel_adapter"):
            found = self._modules.get(name)
            if found is not None and location in found:
                u = found[location](u) if name == "serial_adapter" else found[location](x) + u
        return u


def _hidden(mask: Tensor | None, count: int, x: Tensor) -> Tensor:
    """What hides padding from every row: (B, 1, 1, N); rows that a method put before are seen."""
    if mask is None:
        return x.new_zeros(())
    hidden = (~mask).to(x.dtype) * _FAR
    return F.pad(hidden, (count, 0))[:, None, None, :]


def _future(rows: int, count: int, x: Tensor) -> Tensor:
    """What hides later rows: (1, 1, N, N); the first `count` see and are seen by all."""
    hidden = torch.full((rows, rows), _FAR, dtype=x.dtype, device=x.device).triu(1)
    hidden[:, :count] = 0.0
    return hidden[None, None]


class LowRankPair(nn.Module):
    """(B A x), with B as every head's if it is one head wide, and head by head if A is wider than B's rank."""

    def __init__(self, layer: nn.Linear, method: Any, heads: int):
        super().__init__()
        like = master_copy_of(layer.weight)
        width = layer.out_features // heads if method.heads == "shared" else layer.out_features
        rank = method.rank * (heads if method.heads == "each" else 1)
        self.A = nn.Parameter(torch.randn(rank, layer.in_features, dtype=like.dtype, device=like.device) * 0.02)
        self.B = nn.Parameter(torch.zeros(width, method.rank, dtype=like.dtype, device=like.device))
        self.heads, self.form, self.scale = heads, method.heads, method.scale

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, in) -> (B, N, out)."""
        h = F.linear(x, self.A.to(x.dtype))
        b = self.B.to(x.dtype)
        if self.form == "shared":
            return self.scale * torch.cat([F.linear(h, b)] * self.heads, -1)
        if self.form == "each":
            pairs = zip(h.chunk(self.heads, -1), b.chunk(self.heads), strict=True)
            return self.scale * torch.cat([F.linear(part, own) for part, own in pairs], -1)
        return self.scale * F.linear(h, b)


class _Rows(nn.Module):
    def __init__(self, layer: BertLayer, length: int):
        super().__init__()
        weight = layer.output.dense.weight
        self.prompts = nn.Parameter(master_copy_of(weight).new_empty(length, weight.shape[0]).normal_(std=0.02))


def _add_prompts(layer: BertLayer, method: Any, first: bool) -> None:
    if first:
        layer.prompt_tuning = _Rows(layer, method.length)


def _add_prefix(layer: BertLayer, method: Any, first: bool) -> None:
    layer.prefix = _Rows(layer, method.length)


def _add_lora(layer: BertLayer, method: Any, first: bool) -> None:
    names = {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}
    parts = {"": layer.attention, "cross_": layer.crossattention if method.cross else None}
    heads = layer.attention.self.num_heads
    layer.lora = nn.ModuleDict(
        {
            prefix + role: LowRankPair(part.get_submodule(names[role]), method, heads)
            for prefix, part in parts.items()
            for role in (method.targets if part is not None else ())
        }
    )


def _add_adapters(layer: BertLayer, method: Any, first: bool) -> None:
    serial = method.name == "serial_adapter"
    skip, scale = (True, 1.0) if serial else (method.skip, method.scale)
    weight = layer.output.dense.weight
    here = [at for at in method.locations if at != "cross" or layer.crossattention is not None]
    made = {at: Bottleneck(weight.shape[0], method.hidden, method.bias, skip, scale, weight) for at in here}
    layer.add_module(method.name, nn.ModuleDict(made))


_ADD = {
    "prompt_tuning": _add_prompts,
    "prefix": _add_prefix,
    "lora": _add_lora,
    "serial_adapter": _add_adapters,
    "parallel_adapter": _add_adapters,
}
