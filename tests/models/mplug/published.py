"""The published state dicts of mPLUG, key by key, and where each tensor belongs, from their description alone."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpeft.models.mplug import MPlugConfig

TEXT_TOWER_WIDTH = {768: 512, 1024: 768}


def layout(c: MPlugConfig, momentum: bool = False) -> dict[str, tuple[int, ...]]:
    """Shapes by name, of a fine-tuned file; the fusion there has layers of which only the last ones run."""
    shapes = {
        "visual_encoder.visual.class_embedding": (c.image_width,),
        "visual_encoder.visual.positional_embedding": (c.image_tokens, c.image_width),
        "visual_encoder.visual.conv1.weight": (c.image_width, 3, c.patch_size, c.patch_size),
        "visual_encoder.visual.proj": (c.image_width, TEXT_TOWER_WIDTH.get(c.image_width, 10)),
        **_norm("visual_encoder.visual.ln_pre", c.image_width),
        **_norm("visual_encoder.visual.ln_post", c.image_width),
        **_clip_blocks("visual_encoder.visual.transformer.resblocks", c.image_width, c.image_depth),
        **_clip_text(TEXT_TOWER_WIDTH.get(c.image_width, 10), 12 if c.vocab_size == 30522 else 1),
        **_embeddings("text_encoder.embeddings", c),
        **_bert_layers("text_encoder.encoder.layer", c, c.text_layers, cross=False),
        **_embeddings("fusion_encoder.embeddings", c),
        **_bert_layers("fusion_encoder.encoder.layer", c, c.text_layers + c.fusion_layers, cross=True),
        **_embeddings("text_decoder.bert.embeddings", c),
        **_bert_layers("text_decoder.bert.encoder.layer", c, c.decoder_layers, cross=True),
        **_linear("text_decoder.cls.predictions.transform.dense", c.width, c.width),
        **_norm("text_decoder.cls.predictions.transform.LayerNorm", c.width),
        "text_decoder.cls.predictions.bias": (c.vocab_size,),
        "text_decoder.cls.predictions.decoder.bias": (c.vocab_size,),
        "text_decoder.cls.predictions.decoder.weight": (c.vocab_size, c.width),
    }
    if c.image_width != c.width:
        shapes |= _linear("visn_fc", c.width, c.image_width) | _norm("visn_layer_norm", c.width)
    if momentum:
        for name, shape in list(shapes.items()):
            part, rest = name.split(".", 1)
            shapes[f"{part}_m.{rest}"] = shape
    return shapes


def tensors(c: MPlugConfig, momentum: bool = False) -> dict[str, Tensor]:
    """Random tensors of that layout; tied ones are one tensor."""
    state = {
        name: torch.arange(shape[1])[None] if name.endswith("position_ids") else torch.randn(shape)
        for name, shape in layout(c, momentum).items()
    }
    return tie(state)


def tie(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make the tied tensors one."""
    state["text_decoder.cls.predictions.decoder.weight"] = state["text_decoder.bert.embeddings.word_embeddings.weight"]
    state["text_decoder.cls.predictions.decoder.bias"] = state["text_decoder.cls.predictions.bias"]
    return state


def pretrained(state: dict[str, Tensor], fusion: str = "fusion") -> dict[str, Tensor]:
    """A file of pre-training: prefixes within names, momentum copies, heads and queues."""
    renamed = {}
    for name, tensor in state.items():
        part, rest = name.split(".", 1)
        inner = {"text_encoder": "bert.", "fusion_encoder": f"{fusion}."}.get(part, "")
        renamed[f"{part}.{inner}{rest}"] = tensor
        # One number in the file.
        renamed[f"{part}_m.{inner}{rest}"] = tensor.new_zeros(()).expand(tensor.shape)
    more = ("temp", "vision_proj.weight", "vision_proj_m.bias", "text_proj.bias", "itm_head.weight", "image_queue")
    more += ("text_queue", "queue_ptr", "idx_queue", "text_encoder.cls.predictions.bias", "fusion_encoder.cls.x")
    return renamed | {name: torch.zeros(2) for name in more}


def expected(state: dict[str, Tensor], c: MPlugConfig) -> dict[str, Tensor]:
    """What a model of these sizes is to hold, by its own names."""
    tower = "visual_encoder.visual."
    wanted = {
        "visual_encoder.cls_token": state[tower + "class_embedding"][None, None],
        "visual_encoder.pos_embed": state[tower + "positional_embedding"][None],
        "visual_encoder.patch_embed.proj.weight": state[tower + "conv1.weight"],
    }
    pairs = [("ln_pre", "norm_pre"), ("ln_post", "norm")]
    for n in range(c.image_depth):
        inner = {"ln_1": "norm1", "ln_2": "norm2", "attn.out_proj": "attn.proj"}
        inner |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
        pairs += [(f"transformer.resblocks.{n}.{theirs}", f"blocks.{n}.{ours}") for theirs, ours in inner.items()]
        for kind in ("weight", "bias"):
            joint = state[f"{tower}transformer.resblocks.{n}.attn.in_proj_{kind}"]
            wanted[f"visual_encoder.blocks.{n}.attn.qkv.{kind}"] = joint
    for theirs, ours in pairs:
        for kind in ("weight", "bias"):
            wanted[f"visual_encoder.{ours}.{kind}"] = state[f"{tower}{theirs}.{kind}"]
    last = range(c.text_layers, c.text_layers + c.fusion_layers)
    for name, tensor in state.items():
        part, *inner = name.split(".")
        if part == "fusion_encoder":
            number = int(inner[2]) if inner[0] == "encoder" else -1
            order = number - c.text_layers
            runs = number in last and not (inner[3] == "crossattention" and order and order % c.stride == 0)
        else:
            runs = part in ("text_encoder", "text_decoder", "visn_fc", "visn_layer_norm") and "decoder" not in inner
        if runs and inner[-1] != "position_ids":
            wanted[name] = tensor
    return wanted


def _linear(name: str, out: int, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _clip_blocks(name: str, width: int, depth: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for n in range(depth):
        block = f"{name}.{n}"
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        shapes |= _linear(f"{block}.attn.out_proj", width, width) | _norm(f"{block}.ln_1", width)
        shapes |= _linear(f"{block}.mlp.c_fc", 4 * width, width) | _linear(f"{block}.mlp.c_proj", width, 4 * width)
        shapes |= _norm(f"{block}.ln_2", width)
    return shapes


def _clip_text(width: int, depth: int) -> dict[str, tuple[int, ...]]:
    return {
        "visual_encoder.positional_embedding": (77, width),
        "visual_encoder.token_embedding.weight": (49408 if depth > 1 else 7, width),
        **_norm("visual_encoder.ln_final", width),
        "visual_encoder.text_projection": (width, width),
        "visual_encoder.logit_scale": (),
        **_clip_blocks("visual_encoder.transformer.resblocks", width, depth),
    }


def _embeddings(name: str, c: MPlugConfig) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.position_ids": (1, c.max_positions),
        f"{name}.word_embeddings.weight": (c.vocab_size, c.width),
        f"{name}.position_embeddings.weight": (c.max_positions, c.width),
        f"{name}.token_type_embeddings.weight": (2, c.width),
        **_norm(f"{name}.LayerNorm", c.width),
    }


def _bert_layers(name: str, c: MPlugConfig, depth: int, cross: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for n in range(depth):
        for attention in ("attention", "crossattention") if cross else ("attention",):
            for part in ("self.query", "self.key", "self.value", "output.dense"):
                shapes |= _linear(f"{name}.{n}.{attention}.{part}", c.width, c.width)
            shapes |= _norm(f"{name}.{n}.{attention}.output.LayerNorm", c.width)
        shapes |= _linear(f"{name}.{n}.intermediate.dense", c.intermediate, c.width)
        shapes |= _linear(f"{name}.{n}.output.dense", c.width, c.intermediate)
        shapes |= _norm(f"{name}.{n}.output.LayerNorm", c.width)
    return shapes
