"""Whether a block's branches can run as operators of their own, and what these are told.

A branch is more than its operators one after another where nothing stands between its products that draws random
numbers, is looked at or is unknown: LayerNorm and LayerScale then fold into the products, and nothing between these has
to be a tensor that anybody else can read. Most of it is frozen as a rule; what is not is packed anew for every step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastpeft.engine.description import child
from fastpeft.engine.linear import folded, read
from fastpeft.ops.autocast import suspended
from fastpeft.ops.choose import choose, is_reference
from fastpeft.ops.lora_linear import LowRankTerm

if TYPE_CHECKING:
    from fastpeft.engine.block import BlockRun

# Rows of prompts that are projected like any other rows.
_FEW = 32
# Rows for which packing a trained weight anew pays.
_MANY = 1024


def attention_branch(
    run: BlockRun,
    x: Tensor,
    own: Tensor | None,
    extra: Callable[[Tensor | None], list[tuple[Tensor, Tensor]]],
) -> Tensor | None:
    """x + branch, or None if the block's attention has to be composed.

    Args:
        run: the block's forward.
        x: (B, N, d), all rows of which are queries, keys and values; no mask.
        own: prompt rows that the block inserts, (p, d) or (B, p, d), or None.
        extra: gives keys and values, (H, p, D) or (B, H, p, D), of prompt rows and of what else is nothing but that.
    """
    spec, wish = run.spec, run.backends["block"]
    if run.attn_drop or not _folds(run, "1", ("q_norm", "k_norm", "attn_norm", "proj_drop")):
        return None
    norm = child(run.block, spec.inner["norm1"])
    qkv = layers_of(run, ("qkv",) if spec.fused_qkv else ("q", "k", "v"), norm)
    out = layers_of(run, ("o",))
    if qkv is None or out is None or not pays(x, qkv, out):
        return None
    inner = spec.num_heads * spec.head_dim
    widths = (x.shape[-1], inner, out.weights[0].shape[0])
    weights = (*qkv.weights, *out.weights)
    module = choose("block", wish, x.device, lambda module: module.reasons(x, widths, spec.head_dim, weights))
    if module is None:
        return None
    # Few rows are not worth a pack of their own; what else is keys and values has them ready.
    rows = None
    many = own is not None and run.index is None and own.shape[:-1].numel() >= _FEW and own.dtype == x.dtype
    if many and not (qkv.terms or qkv.trained or extra(None)):
        rows = own
    keys_values = join([] if rows is not None else extra(own), x.shape[0])
    inside = Inside(run, "attn", bool(qkv.terms or out.terms or qkv.norm_trained))
    with suspended(x.device):
        pack = packer(run, module)
        plan = module.Attention(
            pack("qkv", qkv, None),
            pack("o", out, _gamma(run, "1")),
            (qkv.places(module), out.places(module)),
            spec.num_heads,
            spec.head_dim,
            spec.scale,
            norm.eps,
            inside.all,
            run.state.host.memory == "balanced",
            inside.adapter(module),
            (qkv.hands_over(module), out.hands_over(module)),
        )
        factors = [*qkv.factors, *out.factors, *inside.factors, *qkv.handed_over, *out.handed_over]
        y = module.attention_branch(x, rows, *keys_values, plan, factors)
    return y if inside.all else run.around("1", "attn", x, y)


def mlp_branch(run: BlockRun, x: Tensor) -> Tensor | None:
    """As `attention_branch`, for the MLP; x (B, n, d)."""
    found = _mlp_layers(run, x)
    if found is None:
        return None
    module, fc1, fc2, norm = found
    spec = run.spec
    inside = Inside(run, "ffn", bool(fc1.terms or fc2.terms or fc1.norm_trained))
    with suspended(x.device):
        pack = packer(run, module)
        plan = module.Mlp(
            pack("fc1", fc1, None),
            pack("fc2", fc2, _gamma(run, "2")),
            (fc1.places(module), fc2.places(module)),
            spec.activation,
            norm.eps,
            inside.all,
            run.state.host.memory == "balanced",
            inside.adapter(module),
            (fc1.hands_over(module), fc2.hands_over(module)),
        )
        factors = [*fc1.factors, *fc2.factors, *inside.factors, *fc1.handed_over, *fc2.handed_over]
        y = module.mlp_branch(x, plan, factors)
    return y if inside.all else run.around("2", "ffn", x, y)


def mlp_is_whole(run: BlockRun, x: Tensor) -> bool:
    """Whether `mlp_branch` will serve rows like these."""
    return _mlp_layers(run, x) is not None


def _mlp_layers(run: BlockRun, x: Tensor) -> tuple[ModuleType, Layers, Layers, nn.Module] | None:
    spec = run.spec
    if spec.opaque_mlp or spec.activation is None or not _folds(run, "2", ("drop1", "mlp_norm", "drop2")):
        return None
    norm = child(run.block, spec.inner["norm2"])
    fc1, fc2 = layers_of(run, ("fc1",), norm), layers_of(run, ("fc2",))
    if fc1 is None or fc2 is None or not pays(x, fc1, fc2):
        return None
    widths = (x.shape[-1], fc1.weights[0].shape[0], fc2.weights[0].shape[0])
    weights = (*fc1.weights, *fc2.weights)
    module = choose("block", run.backends["block"], x.device, lambda module: module.reasons(x, widths, None, weights))
    return None if module is None else (module, fc1, fc2, norm)


class Inside:
    """Which adapter of a location runs within its branch.

    Attributes:
        all: nothing is left to be done outside.
    """

    def __init__(self, run: BlockRun, location: str, occupied: bool):
        here = [adapter for adapter in run.adapters if adapter.acts_on(location)]
        inner = here[0].bottleneck(location) if len(here) == 1 else None
        # What rides along beside the branch takes the place of low-rank terms, and knows no LayerNorm that is trained.
        if inner is not None and here[0].mode != "serial" and (occupied or inner.skip):
            inner = None
        self._mode, self._inner = here[0].mode if here else None, inner
        self.all = inner is not None or not here

    def adapter(self, module: ModuleType) -> object | None:
        """What is constant of it."""
        return None if self._inner is None else module.Adapter(self._mode, self._inner.act, self._inner.scale)

    @property
    def factors(self) -> list[Tensor | None]:
        if self._inner is None:
            return []
        down, up = self._inner.down, self._inner.up
        return [down.weight, down.bias, up.weight, up.bias]


class Layers:
    """Linear layers side by side behind a LayerNorm, if there is one, with the terms beside them.

    Attributes:
        trained: any of their own tensors is.
        norm_trained: any of the LayerNorm's is.
        folded: of each, what another library has added to its weight.
    """

    def __init__(
        self,
        layers: Sequence[nn.Linear],
        norm: nn.Module | None,
        terms: Sequence[LowRankTerm],
        folded: tuple[Hashable, ...],
    ):
        self.weights = [layer.weight for layer in layers]
        self.biases = [layer.bias for layer in layers]
        self.affine = [] if norm is None else [norm.weight, norm.bias]
        self.terms, self.folded = terms, folded
        self.norm_trained = any(map(_trained, self.affine))
        self.trained = self.norm_trained or any(map(_trained, (*self.weights, *self.biases)))

    @property
    def handed_over(self) -> list[Tensor | None]:
        """All tensors, if any of them is trained."""
        return [*self.weights, *self.biases, *self.affine] if self.trained else []

    def hands_over(self, module: ModuleType) -> object | None:
        """What these are."""
        if not self.trained:
            return None
        return module.Trained(tuple(weight.shape[0] for weight in self.weights), bool(self.affine))

    @property
    def factors(self) -> list[Tensor]:
        return [factor for term in self.terms for factor in (term.a, term.b)]

    def places(self, module: ModuleType) -> tuple:
        return tuple(module.Place(term.start, term.stop, term.scale) for term in self.terms)


def layers_of(run: BlockRun, roles: tuple[str, ...], norm: nn.Module | None = None) -> Layers | None:
    """The layers of these roles, if they are plain and what is beside them is nothing but factors."""
    layers, terms, start = [], [], 0
    modules = [child(run.block, run.spec.roles[role].path) for role in roles]
    for role, module in zip(roles, modules, strict=True):
        found = read(module)
        if found is None:
            return None
        layer, own = found
        if not all(map(_plain, (layer.weight, layer.bias))):
            return None
        added = run.terms("qkv", "q", "k", "v") if role == "qkv" else run.terms(role)
        terms += [term._replace(start=term.start + start, stop=term.stop + start) for term in (*own, *added)]
        layers.append(layer)
        start += layer.weight.shape[0]
    if any(term.dropout is not None or term.bias is not None for term in terms):
        return None
    if len({layer.bias is None for layer in layers}) > 1:
        return None
    found = Layers(layers, norm, terms, tuple(map(folded, modules)))
    # The gradient of a LayerNorm that factors read through as well is the composition's.
    return None if terms and found.norm_trained else found


def _trained(t: Tensor | None) -> bool:
    return t is not None and t.requires_grad


def _plain(t: Tensor | None) -> bool:
    """Whether a tensor is a parameter of the model's own.

    Sharded training puts other things in its place, whose memory comes and goes: nothing may be packed from them.
    """
    return t is None or (type(t) is nn.Parameter and t.numel() > 0 and not hasattr(t, "ds_id"))


def pays(x: Tensor, *layers: Layers) -> bool:
    """Whether there are rows, and enough of them for weights that are packed for this step alone."""
    rows = x.shape[0] * x.shape[1]
    return rows >= _MANY or (rows > 0 and not any(_trained(w) for each in layers for w in each.weights))


def _folds(run: BlockRun, index: str, idle: tuple[str, ...]) -> bool:
    """Whether a branch is LayerNorm, products and a frozen LayerScale, and nobody looks."""
    spec = run.spec
    if run.hooked or is_reference("block", run.backends["block"]) or torch.compiler.is_compiling():
        return False
    if f"norm{index}" not in spec.layer_norms:
        return False
    if not all(map(run.idle, (*idle, f"drop_path{index}"))):
        return False
    norm = child(run.block, spec.inner[f"norm{index}"])
    scale = f"scale{index}"
    if scale not in spec.layer_scales and not run.idle(scale):
        return False
    gamma = _gamma(run, index)
    return all(map(_plain, (norm.weight, norm.bias, gamma))) and not _trained(gamma)


def _gamma(run: BlockRun, index: str) -> Tensor | None:
    scale = f"scale{index}"
    return child(run.block, run.spec.inner[scale]).gamma if scale in run.spec.layer_scales else None


def packer(run: BlockRun, module: ModuleType):
    """Packs layers by name, in the block's own store."""
    if run.state.packs is None:
        run.state.packs = module.Packs()

    def pack(name: str, layers: Layers, gamma: Tensor | None):
        affine = tuple(layers.affine) or (None, None)
        return run.state.packs.layer(name, layers.weights, layers.biases, affine, gamma, layers.folded)

    return pack


def join(pairs: list[tuple[Tensor, Tensor]], batch: int) -> tuple[Tensor | None, Tensor | None]:
    """Keys and values of several sources one behind the other; for each sample if one of them has them so."""
    if not pairs:
        return None, None
    if len(pairs) == 1:
        return pairs[0]
    if any(k.dim() == 4 for k, _ in pairs):
        pairs = [(k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)) for k, v in pairs]
    return torch.cat([k for k, _ in pairs], dim=-2), torch.cat([v for _, v in pairs], dim=-2)
