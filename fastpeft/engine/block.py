"""The transformer block that runs: which rows are computed, which are shared, which are skipped.

    x <- x + branch_attn(x),   x <- x + branch_ffn(x)          (pre-LayerNorm)

Rows of a block's input, in this order: token rows, prompt rows carried from an earlier block, prompt rows that this
block inserts, those that it hands on before the others. A prompt row whose output nobody reads is only a key and a
value: it has no query, no output projection and no FFN, and if the batch shares it, it is normalised and projected
once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastpeft.engine.branches import attention_branch, join, mlp_branch, mlp_is_whole
from fastpeft.engine.description import BlockSpec, child
from fastpeft.engine.extensions import Extension, KeyValues, LowRanks, Noise, Prompts
from fastpeft.engine.hooks import any_hooks, call_under_hooks, draws
from fastpeft.engine.linear import project, read
from fastpeft.errors import MethodError
from fastpeft.ops.choose import is_reference
from fastpeft.ops.layer_norm import add_layer_norm, layer_norm
from fastpeft.ops.lora_linear import LowRankTerm
from fastpeft.ops.mlp import mlp
from fastpeft.ops.prompt_attention import prompt_attention

if TYPE_CHECKING:
    from fastpeft.engine.stack import HostState


@dataclass
class BlockState:
    """What the engine keeps on a block.

    Attributes:
        spec: the block by roles.
        extensions: names of the children that methods added, in the order of attachment.
        carry_in: prompt rows behind the token rows of the input.
        carry_out: prompt rows behind the token rows of the output.
        host: the state of the transformer that the block belongs to.
        packs: frozen weights in the order of a backend that packs them; made by it.
    """

    spec: BlockSpec
    host: HostState
    extensions: tuple[str, ...] = ()
    carry_in: int = 0
    carry_out: int = 0
    packs: object | None = None


def run_block(
    block: nn.Module,
    x: Tensor,
    attn_mask: Tensor | None = None,
    causal: bool = False,
    rows: int | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """Run an adopted block.

    Args:
        block: the module; its `BlockState` says what it is.
        x: (B, N + carry_in, d).
        attn_mask: broadcastable to (B, H, N, N), boolean or additive.
        causal: causal attention among the tokens.
        rows: only the first so many output rows are read; None for all.
        noise: where dropout masks come from; the host's present masks if None.

    Returns:
        (B, rows or N + carry_out, d). More rows than asked for where hooks want to see them.

    Raises:
        MethodError: a mask together with prompts that are carried through the block.
    """
    return BlockRun(block, noise)(x, attn_mask, causal, rows)


def lost_layer(block: nn.Module, spec: BlockSpec) -> str | None:
    """Path of a layer that the description names and the block no longer has, since somebody wrapped its container."""
    for path in [place.path for place in spec.roles.values()] + [spec.mlp]:
        module = block
        for name in path.split("."):
            module = module._modules.get(name)
            if module is None:
                return path
    return None


class BlockRun:
    """One forward of one block."""

    def __init__(self, block: nn.Module, noise: Noise | None):
        state: BlockState = block.fastpeft_block
        self.block, self.state, self.spec = block, state, state.spec
        self.noise = state.host.noise() if noise is None else noise
        self.extensions: list[Extension] = [block._modules[name] for name in state.extensions]
        self.low_ranks = [e for e in self.extensions if isinstance(e, LowRanks)]
        self.adapters = [e for e in self.extensions if hasattr(e, "apply_to")]
        # Of a bank of prompts, which sample has which.
        self.index: Tensor | None = None
        self.hooked = any_hooks(block)
        self.backends = state.host.backends
        drop = state.spec.inner.get("attn_drop")
        # The container's mode counts, as where the rate is handed to the attention function.
        self.attn_drop = child(block, drop).p if drop and child(block, state.spec.attn).training else 0.0

    def __call__(self, x: Tensor, attn_mask: Tensor | None, causal: bool, rows: int | None) -> Tensor:
        state = self.state
        own = self._prompt_rows(x)
        tokens = x.shape[1] - state.carry_in
        if (attn_mask is not None or causal) and (state.carry_in or state.carry_out):
            raise MethodError("prompts that are carried from block to block cannot be combined with an attention mask")
        prunes = rows is not None or own is not None or state.carry_in > state.carry_out
        literal = prunes and self._literal()
        if literal:
            rows = None
        if own is not None and (literal or self._joins()):
            own = own if self.index is None else own[self.index]
            x = torch.cat((x, own.expand(x.shape[0], -1, -1)), dim=1)
            own = self.index = None
        keep = tokens + state.carry_out if rows is None else min(rows, tokens)
        out = x.shape[1] if literal else keep
        if attn_mask is not None and x.shape[1] > tokens:
            attn_mask = _widen(attn_mask, tokens, x.shape[1] - tokens)
        elif causal and (x.shape[1] > tokens or out < tokens):
            attn_mask, causal = _causal(tokens, x.shape[1], x.device), False
        if attn_mask is not None and attn_mask.shape[-2] > out:
            attn_mask = attn_mask[..., :out, :]
        whole = attn_mask is None and not causal and out == x.shape[1]
        x, h = self._attention_branch(x, own, out, attn_mask, causal, whole)
        x = self._mlp_branch(x, h)
        return x[:, :keep] if keep < out else x

    def _attention_branch(
        self, x: Tensor, own: Tensor | None, out: int, mask: Tensor | None, causal: bool, whole: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The first `out` rows of x + attention, and their norm2 if it came with them."""
        if whole:
            y = attention_branch(self, x, own, lambda own: self._of_samples(self._extra(own, x.dtype)))
            if y is not None:
                return y, None
        h = self._norm("norm1", x)
        branch = self._container(self.spec.attn, lambda h: self._attention(h, own, out, mask, causal), h)
        return self._add_and_norm(x[:, :out], branch, h[:, :out])

    def _mlp_branch(self, x: Tensor, h: Tensor | None) -> Tensor:
        if h is None:
            y = mlp_branch(self, x)
            if y is not None:
                return y
            h = self._norm("norm2", x)
        branch = self._container(self.spec.mlp, self._mlp, h)
        return self._add("2", "ffn", x, branch, h)

    def around(self, index: str, location: str, x: Tensor, y: Tensor) -> Tensor:
        """x + branch with its adapters, of what an operator gave for the branch alone."""
        parallel = any(adapter.acts_on(location) and adapter.mode != "serial" for adapter in self.adapters)
        normed = self._norm("norm" + index, x) if parallel else None
        return x + self._adapt(location, y, normed)

    def _prompt_rows(self, x: Tensor) -> Tensor | None:
        """Rows that this block inserts: (p, d) if the batch shares them, else (B, p, d); of a bank (T, p, d)."""
        prompts = [e for e in self.extensions if isinstance(e, Prompts)]
        # The block hands on its first rows, whatever was attached first.
        prompts.sort(key=lambda e: not e.carried)
        found = [e.rows(x.shape[0], x.dtype, self.noise) for e in prompts]
        if not found:
            return None
        self.index = prompts[0].index
        if self.index is not None and len(found) > 1:
            raise MethodError("a bank of prompts cannot be combined with other prompts")
        if len(found) == 1:
            return found[0]
        if all(rows.dim() == 2 for rows in found):
            return torch.cat(found)
        return torch.cat([rows.expand(x.shape[0], -1, -1) for rows in found], dim=1)

    def _literal(self) -> bool:
        """Whether every row must be there in every product.

        Somebody may look at all of them; a random mask depends on how they are grouped; and a layer that the engine
        cannot look into may do anything with them, such as scale them together or draw random numbers.
        """
        if self.hooked or self.attn_drop > 0 or draws(self.block):
            return True
        layers = {place.path for place in self.spec.roles.values()}.union(self.spec.inner_linears)
        return self.spec.unknown_mlp or any(read(child(self.block, path)) is None for path in layers)

    def _joins(self) -> bool:
        """Whether inserted prompts must become ordinary rows of x."""
        if self.state.carry_out > self.state.carry_in:
            return True
        # A mask of LoRA's dropout belongs to one row of one sample, so the batch cannot share a projected prompt.
        return any(e.training and e.draws for e in self.low_ranks)

    def _inner(self, role: str, x: Tensor) -> Tensor:
        path = self.spec.inner.get(role)
        return x if path is None else child(self.block, path)(x)

    def _container(self, path: str, function, h: Tensor) -> Tensor:
        return call_under_hooks(child(self.block, path), function, h) if self.hooked else function(h)

    def _add(self, index: str, location: str, x: Tensor, branch: Tensor, normed: Tensor) -> Tensor:
        return x + self._inner("drop_path" + index, self._branch(index, location, branch, normed))

    def _branch(self, index: str, location: str, branch: Tensor, normed: Tensor) -> Tensor:
        return self._adapt(location, self._inner("scale" + index, branch), normed)

    def _adapt(self, location: str, branch: Tensor, normed: Tensor | None) -> Tensor:
        for adapter in self.adapters:
            if adapter.acts_on(location):
                branch = adapter.apply_to(location, branch, normed, self.backends["adapter"])
        return branch

    def _add_and_norm(self, x: Tensor, branch: Tensor, normed: Tensor) -> tuple[Tensor, Tensor | None]:
        """The sum behind attention, and its norm if one operator gives both."""
        norm = self._fusable_norm("norm2")
        if norm is None or not self.idle("drop_path1") or mlp_is_whole(self, x):
            return self._add("1", "attn", x, branch, normed), None
        gamma = None
        if "scale1" in self.spec.layer_scales and not any(adapter.acts_on("attn") for adapter in self.adapters):
            gamma = child(self.block, self.spec.inner["scale1"]).gamma
        if gamma is None or gamma.requires_grad:
            gamma, branch = None, self._branch("1", "attn", branch, normed)
        return add_layer_norm(x, branch, gamma, norm.weight, norm.bias, norm.eps, self.backends["layer_norm"])

    def _norm(self, role: str, x: Tensor) -> Tensor:
        norm = self._fusable_norm(role)
        if norm is None:
            return self._inner(role, x)
        return layer_norm(x, norm.weight, norm.bias, norm.eps, self.backends["layer_norm"])

    def _fusable_norm(self, role: str) -> nn.Module | None:
        """The LayerNorm of a role if something else than its own forward may compute it."""
        if self.hooked or role not in self.spec.layer_norms or is_reference("layer_norm", self.backends["layer_norm"]):
            return None
        return child(self.block, self.spec.inner[role])

    def idle(self, role: str) -> bool:
        """Whether the module of a role hands on what it is given."""
        path = self.spec.inner.get(role)
        module = None if path is None else child(self.block, path)
        if module is None or isinstance(module, nn.Identity):
            return True
        resting = "drop" in role and not module.training
        return resting or (isinstance(module, nn.Dropout) and module.p == 0)

    def _attention(self, h: Tensor, own: Tensor | None, out: int, mask: Tensor | None, causal: bool) -> Tensor:
        """Queries of the first `out` rows of h; keys and values of h and of the prompt rows `own`."""
        spec = self.spec
        if out < h.shape[1]:
            # A copy of the few rows: a strided input would make the product one small product a sample.
            (q,), (k, v) = self._qkv(h[:, :out].contiguous(), 0, 1), self._qkv(h, 1, 3)
        elif self._concatenates() and self._grows(own) and self._sliceable():
            # Keys and values are copied beside the prompts' ones; queries in the same tensor would keep them alive.
            (q,), (k, v) = self._qkv(h, 0, 1), self._qkv(h, 1, 3)
        else:
            q, k, v = self._qkv(h, 0, 3)
        q = self._inner("q_norm", self._heads(q))
        k, v = self._inner("k_norm", self._heads(k)), self._heads(v)
        options = {"dropout": self.attn_drop, "backend": self.backends["prompt_attention"]}
        extra = self._extra(own, k.dtype)
        if self.index is not None and len(extra) == 1:
            options["prompt_index"] = self.index
        else:
            extra = self._of_samples(extra)
        pk, pv = join(extra, h.shape[0])
        y = prompt_attention(q, k, v, pk, pv, mask, causal, spec.scale, **options)
        y = self._inner("attn_norm", y.transpose(1, 2).flatten(2))
        return self._inner("proj_drop", self._linear("o", y))

    def _extra(self, own: Tensor | None, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the prompt rows that the block inserts and of what methods add as such."""
        extra = [] if own is None else [self._prompt_keys_values(self._norm("norm1", own))]
        for extension in self.extensions:
            if isinstance(extension, KeyValues):
                extra.append(tuple(self._heads(rows.to(dtype)) for rows in extension.keys_values()))
        return extra

    def _of_samples(self, extra: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values with those of a bank of prompts, which come first, chosen for each sample."""
        if self.index is None:
            return extra
        (k, v), *others = extra
        return [(k[self.index], v[self.index]), *others]

    def _concatenates(self) -> bool:
        """Whether attention copies keys and values to put those of prompts beside them."""
        return is_reference("prompt_attention", self.backends["prompt_attention"])

    def _grows(self, own: Tensor | None) -> bool:
        """Whether there are keys and values besides those of the rows."""
        return own is not None or any(isinstance(e, KeyValues) for e in self.extensions)

    def _sliceable(self) -> bool:
        """Whether a part of the fused projection costs a part of its time and draws no random numbers."""
        if not self.spec.fused_qkv:
            return True
        found = read(child(self.block, self.spec.roles["qkv"].path))
        return found is not None and all(term.dropout is None for term in found[1])

    def prompt_keys_values(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (..., H, p, D) of inserted prompt rows (..., p, d)."""
        return self._prompt_keys_values(self._inner("norm1", rows))

    def _prompt_keys_values(self, p: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self._qkv(p, 1, 3)
        return self._inner("k_norm", self._heads(k)), self._heads(v)

    def _heads(self, rows: Tensor) -> Tensor:
        """(..., n, d) -> (..., heads, n, head_dim), a view."""
        return rows.unflatten(-1, (self.spec.num_heads, self.spec.head_dim)).transpose(-3, -2)

    def _qkv(self, h: Tensor, first: int, last: int) -> list[Tensor]:
        """The projections q, k, v from number `first` to before `last`."""
        spec = self.spec
        if spec.fused_qkv:
            fused = spec.roles["qkv"]
            splits = [spec.roles[role].out_features for role in "qkv"]
            terms = self.terms("qkv", "q", "k", "v")
            backend = self.backends["lora_linear"]
            return project(child(self.block, fused.path), h, splits, terms, first, last, backend)
        return [self._linear(role, h) for role in "qkv"[first:last]]

    def _linear(self, role: str, x: Tensor) -> Tensor:
        projection = self.spec.roles[role]
        layer = child(self.block, projection.path)
        backend = self.backends["lora_linear"]
        return project(layer, x, [projection.out_features], self.terms(role), 0, 1, backend)[0]

    def terms(self, *roles: str) -> list[LowRankTerm]:
        """What methods add to the layers of these roles."""
        terms = []
        for extension in self.low_ranks:
            for role in roles:
                place = self.spec.roles[role]
                term = extension.term(role, place.start, place.stop, self.noise)
                if term is not None:
                    terms.append(term)
        return terms

    def _mlp(self, h: Tensor) -> Tensor:
        if self.spec.opaque_mlp:
            return child(self.block, self.spec.mlp).forward(h)
        weights = self._frozen_mlp()
        if weights is not None:
            return mlp(h, *weights, self.spec.activation, self._keep(h), self.backends["mlp"])
        h = self._inner("drop1", self._inner("act", self._linear("fc1", h)))
        return self._inner("drop2", self._linear("fc2", self._inner("mlp_norm", h)))

    def _keep(self, h: Tensor) -> str:
        """What the MLP keeps of its hidden units; eight bits are too few beside an fp32 activation."""
        dtype = torch.get_autocast_dtype(h.device.type) if torch.is_autocast_enabled(h.device.type) else h.dtype
        half = dtype in (torch.bfloat16, torch.float16)
        return "derivative8" if self.state.host.memory == "balanced" and half else "preactivation"

    def _frozen_mlp(self) -> tuple[Tensor | None, ...] | None:
        """Both layers' weights and biases, if the MLP is two frozen layers with an activation that has a name."""
        plain = is_reference("mlp", self.backends["mlp"]) and self.state.host.memory != "balanced"
        if plain or self.hooked or self.spec.activation is None:
            return None
        if not all(map(self.idle, ("drop1", "mlp_norm", "drop2"))) or self.terms("fc1", "fc2"):
            return None
        weights = []
        for role in ("fc1", "fc2"):
            found = read(child(self.block, self.spec.roles[role].path))
            if found is None or found[1]:
                return None
            weights += [found[0].weight, found[0].bias]
        if any(t is not None and t.requires_grad for t in weights):
            return None
        return tuple(weights)


def _widen(mask: Tensor, tokens: int, prompts: int) -> Tensor:
    """A (…, N, N) mask over tokens and prompt rows: everybody sees the prompts."""
    seen = True if mask.dtype == torch.bool else 0.0
    mask = mask.expand(*mask.shape[:-2], tokens, tokens)
    return nn.functional.pad(mask, (0, prompts, 0, prompts), value=seen)


def _causal(tokens: int, rows: int, device: torch.device) -> Tensor:
    mask = torch.ones(rows, rows, dtype=torch.bool, device=device)
    mask[:tokens, :tokens] = mask[:tokens, :tokens].tril()
    return mask
