"""Tensor names of CLIP's image tower: OpenAI's, Hugging Face's, and those of timm's VisionTransformer."""

from __future__ import annotations

import re

from torch import Tensor

_OPENAI = {
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "conv1.weight": "patch_embed.proj.weight",
    "ln_pre.weight": "norm_pre.weight",
    "ln_pre.bias": "norm_pre.bias",
    "ln_post.weight": "norm.weight",
    "ln_post.bias": "norm.bias",
}
_OPENAI_BLOCK = {
    "ln_1.weight": "norm1.weight",
    "ln_1.bias": "norm1.bias",
    "attn.in_proj_weight": "attn.qkv.weight",
    "attn.in_proj_bias": "attn.qkv.bias",
    "attn.out_proj.weight": "attn.proj.weight",
    "attn.out_proj.bias": "attn.proj.bias",
    "ln_2.weight": "norm2.weight",
    "ln_2.bias": "norm2.bias",
    "mlp.c_fc.weight": "mlp.fc1.weight",
    "mlp.c_fc.bias": "mlp.fc1.bias",
    "mlp.c_proj.weight": "mlp.fc2.weight",
    "mlp.c_proj.bias": "mlp.fc2.bias",
}
_TIMM = {theirs: ours for ours, theirs in _OPENAI.items()}
_TIMM_BLOCK = {theirs: ours for ours, theirs in _OPENAI_BLOCK.items()}

# Hugging Face's -> OpenAI's. The name of the first norm is misspelt there.
_HF = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "pre_layrnorm.weight": "ln_pre.weight",
    "pre_layrnorm.bias": "ln_pre.bias",
    "post_layernorm.weight": "ln_post.weight",
    "post_layernorm.bias": "ln_post.bias",
}
_HF_BLOCK = {
    "layer_norm1.": "ln_1.",
    "self_attn.out_proj.": "attn.out_proj.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}
# Query, key and value are three tensors there; in this order they are OpenAI's one.
THIRDS = ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")
QUERY, JOINT = THIRDS[0], "attn.in_proj_"


def timm_name(name: str) -> str | None:
    """timm's name of a tensor of the tower, or None where timm's has no such tensor (`proj`)."""
    block = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)", name)
    if block is None:
        return _OPENAI.get(name)
    inner = _OPENAI_BLOCK.get(block[2])
    return None if inner is None else f"blocks.{block[1]}.{inner}"


def openai_name(name: str) -> str | None:
    """OpenAI's name of a tensor of timm's, or None where CLIP's tower has no such tensor."""
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if block is None:
        return _TIMM.get(name)
    inner = _TIMM_BLOCK.get(block[2])
    return None if inner is None else f"transformer.resblocks.{block[1]}.{inner}"


def timm_tensor(name: str, tensor: Tensor) -> Tensor:
    """A published tensor in the shape of timm's tensor `name`: tables have a batch axis there."""
    if name == "cls_token" and tensor.ndim == 1:
        return tensor[None, None]
    if name == "pos_embed" and tensor.ndim == 2:
        return tensor[None]
    return tensor


def openai_tensor(name: str, tensor: Tensor) -> Tensor:
    """timm's tensor `name` in the published shape."""
    if name == "cls_token":
        return tensor[0, 0]
    return tensor[0] if name == "pos_embed" else tensor


def openai_from_hugging_face(name: str) -> str:
    """OpenAI's name within the tower of a tensor of Hugging Face's; names without one, and the thirds, keep theirs."""
    inner = name.removeprefix("vision_model.")
    if inner == name:
        return name
    block = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", inner)
    if block is None:
        return _HF.get(inner, name)
    for theirs, ours in (*_HF_BLOCK.items(), *((third, third) for third in THIRDS)):
        if block[2].startswith(theirs):
            return f"transformer.resblocks.{block[1]}.{ours}{block[2].removeprefix(theirs)}"
    return name
