"""fastpeft's own mPLUG: text encoder, fusion and decoder. Its image tower is of another family, as its own stack."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastpeft.engine.adopt import Adopted, original_class
from fastpeft.engine.block import lost_layer
from fastpeft.engine.description import BlockSpec, HostSpec, Projection, child
from fastpeft.engine.extensions import InputPrompts
from fastpeft.engine.hooks import any_hooks, replaced, watched
from fastpeft.engine.post_norm import run_post_norm
from fastpeft.engine.stack import EngineHost, begin, call_block
from fastpeft.errors import UnsupportedModelError
from fastpeft.models.families import Family
from fastpeft.ops.linear_cross_entropy import linear_cross_entropy

if TYPE_CHECKING:
    from fastpeft.models.mplug.stream import Stream

_LAYERS = {"text": "text_encoder.encoder", "fusion": "fusion_encoder.encoder", "decoder": "text_decoder.bert.encoder"}
_TRANSFORM = tuple(
    f"text_decoder.cls.predictions.{name}"
    for name in (
        "bias",
        *(f"transform.{layer}.{kind}" for layer in ("dense", "LayerNorm") for kind in ("weight", "bias")),
    )
)


class MPlugBlock(Adopted):
    """A `BertLayer` that the engine runs."""

    def forward(
        self, x: Tensor, mask=None, causal: bool = False, memory=None, memory_mask=None, cache=None, noise=None
    ):
        state = self.fastpeft_block
        lost = lost_layer(self, state.spec)
        if not state.extensions and (lost or any_hooks(self)):
            return super().forward(x, mask, causal, memory, memory_mask, cache)
        if lost:
            raise UnsupportedModelError(
                f"{lost} of a block is no longer there: its container was wrapped after the model was patched with a "
                "method; wrap the model first, then patch it"
            )
        return run_post_norm(self, x, mask, causal, memory, memory_mask, cache, noise)


class MPlugHost(EngineHost):
    """An `MPlug` whose blocks the engine runs."""

    def _enter(self, stack: str, text: Stream) -> Stream:
        noise = begin(self)
        prompts = self._prompts(stack)
        if prompts is None:
            return text
        batch = text.states.shape[0]
        rows = prompts.rows(batch, text.states.dtype, noise).expand(batch, -1, -1)
        mask = text.mask
        if mask is not None:
            mask = torch.cat((mask.new_ones(batch, rows.shape[1]), mask), 1)
        return text._replace(states=torch.cat((rows, text.states), 1), mask=mask)

    def _call(self, stack: str, number: int, layer: nn.Module, x: Tensor, options: dict) -> Tensor:
        # Recomputation would add to a cache twice, whatever is asked for.
        checkpointing = None if options.get("cache") is not None else False
        return call_block(layer, x, {"noise": self.fastpeft_host.noise()}, checkpointing, options)

    def _losses(self, states: Tensor, targets: Tensor) -> Tensor:
        decoder = self.text_decoder
        head, weight = decoder.cls.predictions, decoder.bert.embeddings.word_embeddings.weight
        if watched(*head.modules()):
            return super()._losses(states, targets)
        backend = self.fastpeft_host.backends["linear_cross_entropy"]
        return linear_cross_entropy(head.transform(states), weight, head.bias, targets, backend)

    def _tokens(self, rows: int, first: int) -> int:
        prompts = self._prompts("decoder") if first == 0 else None
        return rows if prompts is None else rows - prompts.length

    def _prompts(self, stack: str) -> InputPrompts | None:
        path = self.fastpeft_host.spec.inputs.get(stack)
        if path is None:
            return None
        block = child(self, path)
        state = block.__dict__.get("fastpeft_block")
        # A block that was wrapped since is looked for among the modules that there are.
        inside = block.modules() if state is None else (block._modules[name] for name in state.extensions)
        return next((module for module in inside if isinstance(module, InputPrompts)), None)


class MPlugFamily(Family):
    """Recognition of `fastpeft.models.mplug.MPlug`."""

    requires = "fastpeft.models.mplug.model"
    host = MPlugHost
    block = MPlugBlock
    nested = ("visual_encoder",)

    def matches(self, module: nn.Module) -> bool:
        from fastpeft.models.mplug.model import MPlug

        return isinstance(module, MPlug)

    def describe(self, module: nn.Module) -> HostSpec:
        from fastpeft.models.mplug.model import MPlug

        cls = original_class(module)
        for name in ("encode_text", "fuse", "hidden"):
            if getattr(cls, name) is not getattr(MPlug, name):
                raise UnsupportedModelError(f"{cls.__name__} has a {name} of its own; the engine runs MPlug's")
        spec = HostSpec(
            family="mPLUG",
            dim=module.config.width,
            blocks=[],
            stem=("visual_encoder", "visn_fc", "visn_layer_norm"),
            final=(),
            heads=(),
            patch_area=3 * module.config.patch_size**2,
            known_readout=False,
            towers={"image": "visual_encoder"},
            unread=_unread(module.visual_encoder),
            classifiers={
                "head": (*_TRANSFORM, "text_decoder.bert.embeddings.word_embeddings.weight"),
                "transform": _TRANSFORM,
            },
        )
        for stack, path in _LAYERS.items():
            for number, layer in module.get_submodule(path).numbered():
                place = f"{path}.layer.{number}"
                reason = _unsupported(layer)
                if reason:
                    spec.left_alone.append((place, reason))
                    continue
                spec.blocks.append((place, _describe(layer, stack)))
                if stack != "fusion":
                    spec.inputs.setdefault(stack, place)
        return spec


def _unread(tower: nn.Module) -> tuple[str, ...]:
    """A tower that reads out for itself is asked for its tokens alone: what timm's `forward_head` runs, by path."""
    return tuple(
        f"visual_encoder.{f'{path}.' if path else ''}{name}"
        for path, module in tower.named_modules()
        if hasattr(module, "forward_head")
        for name in ("attn_pool", "fc_norm", "head", "head_dist")
        if isinstance(getattr(module, name, None), nn.Module)
    )


def _unsupported(layer: nn.Module) -> str | None:
    """Why the engine cannot run a layer, or None."""
    from fastpeft.models.mplug.layers import BertLayer

    if replaced(layer):
        return "its forward was replaced on the instance (accelerate's hooks do that); patch first, then add them"
    if original_class(layer) is not BertLayer:
        return f"a {original_class(layer).__name__} is not mPLUG's BertLayer"
    return None


def _describe(layer: nn.Module, stack: str) -> BlockSpec:
    heads = layer.attention.self.num_heads
    dim = layer.attention.output.dense.weight.shape[0]
    hidden = layer.intermediate.dense.weight.shape[0]
    roles = {
        **_attention_roles("attention", "", dim),
        "fc1": Projection("intermediate.dense", 0, hidden, dim),
        "fc2": Projection("output.dense", 0, dim, hidden),
    }
    inner = {
        "norm1": "attention.output.LayerNorm",
        "norm2": "output.LayerNorm",
        "attn_drop": "attention.self.dropout",
        "proj_drop": "attention.output.dropout",
        "drop2": "output.dropout",
    }
    norms = ["norm1", "norm2"]
    containers = {"attn_out": "attention.output", "hidden": "intermediate", "ffn_out": "output"}
    if layer.crossattention is not None:
        roles |= _attention_roles("crossattention", "cross_", dim)
        inner |= {
            "cross_norm": "crossattention.output.LayerNorm",
            "cross_drop": "crossattention.self.dropout",
            "cross_proj_drop": "crossattention.output.dropout",
        }
        norms.append("cross_norm")
        containers["cross_out"] = "crossattention.output"
    return BlockSpec(
        dim=dim,
        num_heads=heads,
        head_dim=dim // heads,
        scale=(dim // heads) ** -0.5,
        roles=roles,
        fused_qkv=False,
        inner=inner,
        attn="attention.self",
        mlp="output",
        layer_norms=tuple(norms),
        activation="gelu",
        post_norm=True,
        cross="crossattention.self" if layer.crossattention is not None else "",
        containers=containers,
        stack=stack,
    )


def _attention_roles(path: str, prefix: str, dim: int) -> dict[str, Projection]:
    names = {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}
    return {prefix + role: Projection(f"{path}.{name}", 0, dim, dim) for role, name in names.items()}


FAMILY = MPlugFamily()
