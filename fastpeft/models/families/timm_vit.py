"""timm's VisionTransformer: ViT, DeiT (also distilled), DINOv2, CLIP and SigLIP towers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fastpeft.engine.adopt import Adopted, original_class
from fastpeft.engine.block import lost_layer, run_block
from fastpeft.engine.description import BlockSpec, HostSpec, Projection
from fastpeft.engine.hooks import any_hooks, call_under_hooks, draws, has_hooks, replaced, watched
from fastpeft.engine.stack import EngineHost, begin, call_block, run_blocks
from fastpeft.errors import UnsupportedModelError
from fastpeft.models.families import Family
from fastpeft.ops.activation import name_of

_STEM = ("cls_token", "dist_token", "reg_token", "pos_embed", "patch_embed", "pos_drop", "patch_drop", "norm_pre")
_FINAL = ("norm", "attn_pool", "fc_norm", "head_drop")
_HEADS = ("head", "head_dist")
_FORWARDS = ("forward", "forward_features", "forward_intermediates")
_READOUT = ("forward_head", "pool")


class TimmBlock(Adopted):
    """A `timm` Block that the engine runs."""

    def forward(self, x: Tensor, attn_mask=None, is_causal: bool = False, rows: int | None = None, noise=None):
        state = self.fastpeft_block
        lost = lost_layer(self, state.spec)
        if not state.extensions and not state.carry_in:
            # Without fused attention timm resolves masks and draws dropout in an order of its own.
            odd = not self.attn.fused_attn and (attn_mask is not None or is_causal or draws(self))
            if lost or odd or any_hooks(self):
                return super().forward(x, **_mask(attn_mask, is_causal))
        elif lost:
            raise UnsupportedModelError(
                f"{lost} of a block is no longer there: its container was wrapped after the model was patched with a "
                "method; wrap the model first, then patch it"
            )
        return run_block(self, x, attn_mask, is_causal, rows, noise)


def _mask(attn_mask: Tensor | None, is_causal: bool) -> dict:
    """The arguments of a masked forward; older blocks do not know the second one, and only get what is set."""
    return ({} if attn_mask is None else {"attn_mask": attn_mask}) | ({"is_causal": True} if is_causal else {})


class TimmVisionTransformer(EngineHost):
    """A `timm` VisionTransformer whose blocks the engine runs."""

    def forward(self, x: Tensor, attn_mask=None, is_causal: bool = False):
        noise = begin(self)
        x = self._fastpeft_blocks(self._fastpeft_stem(x), noise, attn_mask, is_causal, self._fastpeft_rows())
        return self.forward_head(self.norm(x))

    def forward_features(self, x: Tensor, attn_mask=None, is_causal: bool = False):
        noise = begin(self)
        return self.norm(self._fastpeft_blocks(self._fastpeft_stem(x), noise, attn_mask, is_causal, None))

    def forward_intermediates(self, x: Tensor, *args, **kwargs):
        noise = begin(self)
        states = [block.fastpeft_block for block in self.blocks if isinstance(block, TimmBlock)]
        carries = any(state.carry_out for state in states)
        if noise is None and not carries and self.fastpeft_host.memory != "small":
            return super().forward_intermediates(x, *args, **kwargs)
        # Prompt rows travel beside the tokens here: whoever asks for intermediates gets token rows. And a block that
        # is run again in the backward pass draws this forward's masks, whatever the clock shows by then.
        view = copy.copy(self)
        blocks = _Separated(self.blocks, noise, None if self.grad_checkpointing else False, {} if carries else None)
        view.__dict__ = {**self.__dict__, "_modules": {**self._modules, "blocks": blocks}}
        return original_class(self).forward_intermediates(view, x, *args, **kwargs)

    def _fastpeft_stem(self, x: Tensor) -> Tensor:
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))

    def _fastpeft_blocks(self, x, noise, attn_mask, is_causal: bool, rows: int | None, start: int = 0) -> Tensor:
        if attn_mask is not None or is_causal:
            for block in self.blocks[start:]:
                x = call_block(block, x, {"noise": noise}, False, _mask(attn_mask, is_causal))
            return x
        if start == 0 and not self.grad_checkpointing and watched(self.blocks):
            if self.fastpeft_host.memory == "small" and has_hooks(self.blocks) and not replaced(self.blocks):
                # The container's own forward runs every block once and keeps all that they keep.
                return call_under_hooks(self.blocks, lambda x: self._fastpeft_each(x, noise, 0), x)
            return self.blocks(x)
        if len(self.fastpeft_host.spec.blocks) == len(self.blocks):
            return run_blocks(self, x, noise, rows, start, checkpointing=self.grad_checkpointing)
        return self._fastpeft_each(x, noise, start)

    def _fastpeft_each(self, x: Tensor, noise, start: int) -> Tensor:
        for block in self.blocks[start:]:
            x = call_block(block, x, {"noise": noise}, self.grad_checkpointing)
        return x

    def _fastpeft_rows(self) -> int | None:
        """How many of the last block's rows the head reads: they come first."""
        if self.global_pool != "token" or self.attn_pool is not None:
            return None
        if not self.fastpeft_host.spec.known_readout or any(name in self.__dict__ for name in _READOUT):
            return None
        if watched(self.blocks, self.blocks[-1], self.norm, self.fc_norm):
            return None
        return 2 if hasattr(self, "head_dist") else 1

    def _fastpeft_pools(self) -> bool:
        """Whether the head reads one pooled row an image, as timm's own forward_head does it."""
        own = self.fastpeft_host.spec.known_readout and not any(name in self.__dict__ for name in _READOUT)
        return own and bool(self.global_pool) and not hasattr(self, "head_dist")

    def fastpeft_encode(self, images: Tensor, start: int) -> Tensor:
        """What comes before block `start`; everything before the head's layer for start > number of blocks."""
        x = self._fastpeft_stem(images)
        noise = begin(self)
        rows = self._fastpeft_rows() if start >= len(self.blocks) else None
        x = run_blocks(self, x, noise, rows, stop=start)
        if start <= len(self.blocks):
            return x
        x = self.norm(x)
        return self.fc_norm(self.pool(x)) if self._fastpeft_pools() else x

    def fastpeft_decode(self, features: Tensor, start: int) -> Tensor:
        """The rest of the forward, from what `fastpeft_encode` gave."""
        noise = begin(self)
        if start > len(self.blocks):
            return self.head(self.head_drop(features)) if self._fastpeft_pools() else self.forward_head(features)
        if start < len(self.blocks):
            features = run_blocks(
                self, features, noise, self._fastpeft_rows(), start, checkpointing=self.grad_checkpointing
            )
        return self.forward_head(self.norm(features))


class _Separated:
    """A host's blocks for one forward, each taking and giving token rows; the carried prompts wait here, if any are."""

    def __init__(self, blocks, noise, checkpointing: bool | None, carried: dict | None):
        self.blocks = blocks
        self.noise, self.checkpointing, self.carried = noise, checkpointing, carried

    def __iter__(self):
        return (
            _Step(index, block, self.noise, self.checkpointing, self.carried) for index, block in enumerate(self.blocks)
        )

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: slice) -> _Separated:
        return _Separated(self.blocks[index], self.noise, self.checkpointing, self.carried)


class _Step:
    def __init__(self, index: int, block: nn.Module, noise, checkpointing: bool | None, carried: dict | None):
        self.index, self.block = index, block
        self.noise, self.checkpointing, self.carried = noise, checkpointing, carried

    def __call__(self, x: Tensor, **kwargs) -> Tensor:
        if self.carried is not None and self.block.fastpeft_block.carry_in:
            x = torch.cat((x, self.carried[self.index]), dim=1)
        # timm's own checkpointing leaves masked blocks out.
        x = call_block(self.block, x, {"noise": self.noise}, False if kwargs else self.checkpointing, kwargs)
        out = 0 if self.carried is None else self.block.fastpeft_block.carry_out
        if out:
            x, self.carried[self.index + 1] = x[:, :-out], x[:, -out:]
        return x


class TimmVitFamily(Family):
    """Recognition of `timm.models.vision_transformer.VisionTransformer` and of what derives from it unchanged."""

    requires = "timm.models.vision_transformer"
    host = TimmVisionTransformer
    block = TimmBlock

    def matches(self, module: nn.Module) -> bool:
        from timm.models.vision_transformer import VisionTransformer

        return isinstance(module, VisionTransformer)

    def describe(self, module: nn.Module) -> HostSpec:
        from timm.models.vision_transformer import VisionTransformer

        cls = original_class(module)
        for name in _FORWARDS:
            # A forward on the instance, as accelerate's hooks put there, calls the class's own in the end.
            if getattr(cls, name) is not getattr(VisionTransformer, name) or name in {*module.__dict__} - {"forward"}:
                raise UnsupportedModelError(
                    f"{type(module).__name__} has a {name} of its own; the engine runs timm's VisionTransformer"
                )
        if len(module.blocks) == 0:
            raise UnsupportedModelError(f"{type(module).__name__} has no blocks")
        spec = HostSpec(
            family="timm VisionTransformer",
            dim=module.embed_dim,
            blocks=[],
            stem=_STEM,
            final=tuple(name for name in _FINAL if isinstance(getattr(module, name, None), nn.Module)),
            heads=tuple(name for name in _HEADS if isinstance(getattr(module, name, None), nn.Module)),
            patch_area=_patch_area(module),
            known_readout=_known_readout(cls),
            read_tokens=_read_tokens(module),
        )
        for index, block in enumerate(module.blocks):
            path = f"blocks.{index}"
            reason = _unsupported(block)
            if reason:
                spec.left_alone.append((path, reason))
            else:
                spec.blocks.append((path, _describe_block(block, module.embed_dim)))
        return spec


def _patch_area(module: nn.Module) -> int:
    height, width = module.patch_embed.patch_size
    return getattr(module, "in_chans", 3) * height * width


def _known_readout(cls: type) -> bool:
    """Whether the class reads its head's input from the rows that `_fastpeft_rows` says."""
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    heads = (VisionTransformer.forward_head, VisionTransformerDistilled.forward_head)
    return cls.forward_head in heads and cls.pool is VisionTransformer.pool


def _read_tokens(module: nn.Module) -> tuple[str, ...]:
    if module.global_pool != "token":
        return ()
    return tuple(name for name in ("cls_token", "dist_token") if getattr(module, name, None) is not None)


def _unsupported(block: nn.Module) -> str | None:
    """Why the engine cannot run a block, or None."""
    from timm.layers import Attention
    from timm.models.vision_transformer import Block

    if replaced(block):
        return "its forward was replaced on the instance (accelerate's hooks do that); patch first, then add them"
    if original_class(block) is not Block:
        return f"a {original_class(block).__name__} is not timm's pre-norm Block"
    if type(block.attn) is not Attention:
        return f"its attention is a {type(block.attn).__name__}, not timm's Attention"
    if getattr(block.attn, "gate", None) is not None:
        return "its attention output is gated"
    return None


def _describe_block(block: nn.Module, dim: int) -> BlockSpec:
    from timm.layers import GluMlp, LayerNorm, LayerScale, Mlp, SwiGLU

    attn, mlp = block.attn, block.mlp
    width = attn.num_heads * attn.head_dim
    roles = {
        "qkv": Projection("attn.qkv", 0, 3 * width, dim),
        "q": Projection("attn.qkv", 0, width, dim),
        "k": Projection("attn.qkv", width, 2 * width, dim),
        "v": Projection("attn.qkv", 2 * width, 3 * width, dim),
        "o": Projection("attn.proj", 0, dim, width),
    }
    inner = {
        "norm1": "norm1",
        "norm2": "norm2",
        "q_norm": "attn.q_norm",
        "k_norm": "attn.k_norm",
        "attn_drop": "attn.attn_drop",
        "attn_norm": "attn.norm",
        "proj_drop": "attn.proj_drop",
        "scale1": "ls1",
        "scale2": "ls2",
        "drop_path1": "drop_path1",
        "drop_path2": "drop_path2",
    }
    hidden = getattr(mlp.fc1, "out_features", None) if type(mlp) is Mlp else None
    if hidden is not None:
        roles["fc1"] = Projection("mlp.fc1", 0, hidden, dim)
        roles["fc2"] = Projection("mlp.fc2", 0, dim, hidden)
        inner |= {"act": "mlp.act", "drop1": "mlp.drop1", "mlp_norm": "mlp.norm", "drop2": "mlp.drop2"}
    # Gated MLPs treat every row by itself, as long as their linear layers do.
    gated = type(mlp) in (GluMlp, SwiGLU)
    known = tuple(f"mlp.{name}" for name, _ in mlp.named_children() if gated and name.startswith("fc"))
    norms = [role for role in ("norm1", "norm2") if type(getattr(block, role)) in (nn.LayerNorm, LayerNorm)]
    scales = [role for role in ("scale1", "scale2") if type(getattr(block, inner[role])) is LayerScale]
    return BlockSpec(
        dim=dim,
        num_heads=attn.num_heads,
        head_dim=attn.head_dim,
        scale=attn.scale,
        roles=roles,
        fused_qkv=True,
        inner=inner,
        attn="attn",
        mlp="mlp",
        inner_linears=known,
        layer_norms=tuple(norms),
        layer_scales=tuple(scales),
        activation=_activation(mlp.act) if hidden is not None else None,
    )


def _activation(act: nn.Module) -> str | None:
    """The name of an activation, torch's or timm's."""
    from timm.layers import activations

    known = {activations.GELU: "gelu", activations.GELUTanh: "gelu_tanh", activations.QuickGELU: "quick_gelu"}
    return known.get(type(act)) or name_of(act)


FAMILY = TimmVitFamily()
