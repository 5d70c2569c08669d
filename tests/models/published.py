"""Tiny checkpoints in the layouts in which vision transformers are published, made from a model's own tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastpeft._compat import import_timm

HEADS = 2


def vit(**options) -> nn.Module:
    """A vision transformer with every tensor random, 2 blocks of width 12."""
    timm = import_timm()
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": HEADS, "num_classes": 3}
    model = timm.models.vision_transformer.VisionTransformer(**{**sizes, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def write_npz(path: Path, model: nn.Module, prefix: str = "") -> None:
    """Google's archive of a model."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    width = state["cls_token"].shape[-1]
    entries = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": np.zeros((width, 21843), np.float32),
        "head/bias": np.zeros(21843, np.float32),
    }
    for i in range(len(model.blocks)):
        ours, theirs = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        for norm, name in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            entries[f"{theirs}/{name}/scale"] = state[f"{ours}.{norm}.weight"]
            entries[f"{theirs}/{name}/bias"] = state[f"{ours}.{norm}.bias"]
        for linear, name in (("mlp.fc1", "Dense_0"), ("mlp.fc2", "Dense_1")):
            entries[f"{theirs}/MlpBlock_3/{name}/kernel"] = state[f"{ours}.{linear}.weight"].T
            entries[f"{theirs}/MlpBlock_3/{name}/bias"] = state[f"{ours}.{linear}.bias"]
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        weights, biases = np.split(state[f"{ours}.attn.qkv.weight"], 3), np.split(state[f"{ours}.attn.qkv.bias"], 3)
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            entries[f"{attention}/{part}/kernel"] = weight.T.reshape(width, HEADS, -1)
            entries[f"{attention}/{part}/bias"] = bias.reshape(HEADS, -1)
        entries[f"{attention}/out/kernel"] = state[f"{ours}.attn.proj.weight"].T.reshape(HEADS, -1, width)
        entries[f"{attention}/out/bias"] = state[f"{ours}.attn.proj.bias"]
    np.savez(path, **{prefix + name: array for name, array in entries.items()})


def backbone(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors without its head."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.startswith("head.")}


def assert_same(model: nn.Module, expected: dict[str, Tensor]) -> None:
    """The model holds exactly these tensors, bit for bit."""
    state = model.state_dict()
    different = [name for name, tensor in expected.items() if not torch.equal(state[name], tensor)]
    assert not different
