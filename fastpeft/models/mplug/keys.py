"""Names of mPLUG's published state dicts: which tensor of the model each one is, and which are left out on purpose.

The model's own names are the published ones, but for the image tower, which has timm's. Files of pre-training put
`bert.` or `fusion.` into names of the text encoder and the fusion; distributed training puts `module.` before all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from fastpeft.errors import FastPEFTError
from fastpeft.models.mplug import clip_names

_TOWER, _PUBLISHED_TOWER = "visual_encoder.", "visual_encoder.visual."
_PREFIXES = (
    (re.compile(r"^(module\.)+"), ""),
    (re.compile(r"^text_encoder\.bert\."), "text_encoder."),
    (re.compile(r"^fusion_encoder\.(fusion|bert)\."), "fusion_encoder."),
)
# A second name of a tensor -> the name under which the model has it.
TIED = {
    "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}
TIED_GROUP = "second names of tied tensors"
_GROUPS = tuple(
    (group, re.compile(pattern))
    for group, pattern in (
        ("momentum copies", r"[a-z_]+_m\..+"),
        (
            "CLIP's text tower",
            r"visual_encoder\.((transformer|token_embedding|ln_final)\..+|positional_embedding|text_projection"
            r"|logit_scale|input_resolution|context_length|vocab_size)|text_model\..+|text_projection\.weight|logit_scale",
        ),
        ("CLIP's image projection", r"visual_encoder\.visual\.proj|visual_projection\.weight"),
        ("position ids", r".+\.position_ids"),
        ("fusion embeddings", r"fusion_encoder\.embeddings\..+"),
        (
            "heads and queues of pre-training",
            r"temp|(vision_proj|text_proj|itm_head)\..+|image_queue|text_queue|queue_ptr|ptr_queue|idx_queue"
            r"|(text_encoder|fusion_encoder)\.cls\..+|cls\.seq_relationship\..+",
        ),
        ("BERT's layers that no stack takes", r"encoder\.layer\.\d+\..+"),
        ("poolers", r"((text_encoder|fusion_encoder|text_decoder\.bert)\.)?pooler\..+"),
    )
)
_FUSION_LAYER = re.compile(r"fusion_encoder\.encoder\.layer\.(\d+)\.(crossattention\.)?.+")
# What the model has no place for, though it has such parts: the file is of another model.
_USED_PARTS = re.compile(
    r"visual_encoder\.blocks\.\d+\..+|visn_(fc|layer_norm)\..+|(text_encoder|fusion_encoder)\.encoder\.layer\.\d+\..+"
    r"|text_decoder\.bert\.encoder\.layer\.\d+\..+"
)


def model_name(name: str) -> str:
    """The model's name of a file's tensor; a name without a place in the model stays, but for its prefixes."""
    for pattern, instead in _PREFIXES:
        name = pattern.sub(instead, name)
    if name.startswith(_PUBLISHED_TOWER):
        timm = clip_names.timm_name(name.removeprefix(_PUBLISHED_TOWER))
        name = name if timm is None else _TOWER + timm
    return name


def published_name(name: str) -> str:
    """The published name of a tensor of the model; its own, if nothing such is published."""
    if not name.startswith(_TOWER):
        return name
    clip = clip_names.openai_name(name.removeprefix(_TOWER))
    return name if clip is None else _PUBLISHED_TOWER + clip


class Found(NamedTuple):
    """A tensor of a file.

    Attributes:
        given: its name there.
        tensor: in the shape that the model has it in.
        shape: its shape in the file.
    """

    given: str
    tensor: Tensor
    shape: tuple[int, ...]


def by_model_name(state: dict[str, Tensor], label: str) -> dict[str, Found]:
    """A file's tensors by the model's names.

    Raises:
        FastPEFTError: two different tensors of the file are the same one of the model.
    """
    found: dict[str, Found] = {}
    for given, tensor in state.items():
        name = model_name(given)
        new = in_model_shape(name, given, tensor)
        if name in found and not same(found[name].tensor, new.tensor):
            raise FastPEFTError(
                f"{label}: {found[name].given} and {given} are two names of one tensor, and they differ"
            )
        found.setdefault(name, new)
    return found


def in_model_shape(name: str, given: str, tensor: Tensor) -> Found:
    """A file's tensor `given` for the model's tensor `name`: timm's tables have a batch axis, published ones none."""
    shape = tuple(tensor.shape)
    if name.startswith(_TOWER):
        tensor = clip_names.timm_tensor(name.removeprefix(_TOWER), tensor)
    return Found(given, tensor, shape)


def published_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's tensors by published names and in published shapes; an image tower of another form keeps timm's."""
    tower = [name.removeprefix(_TOWER) for name in state if name.startswith(_TOWER)]
    if any(clip_names.openai_name(name) is None for name in tower) or "norm_pre.weight" not in tower:
        return dict(state)
    published = {}
    for name, tensor in state.items():
        if name.startswith(_TOWER):
            tensor = clip_names.openai_tensor(name.removeprefix(_TOWER), tensor)
        published[published_name(name)] = tensor
    return published


def same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same values."""
    return first.shape == second.shape and bool((first.float() == second.float()).all())


class Layout:
    """Which names a model has, and why it has not the others.

    Args:
        names: of the model's state dict.
    """

    def __init__(self, names: Iterable[str]):
        self.names = frozenset(names)
        layers = [(int(match[1]), match[2]) for match in map(_FUSION_LAYER.fullmatch, self.names) if match]
        self.first_fusion_layer = min((number for number, _ in layers), default=0)
        self.connected = {number for number, _ in layers} - {number for number, cross in layers if cross}

    def group(self, name: str) -> str | None:
        """Why a tensor that the model does not have is left out; None if nothing says that it may be."""
        for group, pattern in _GROUPS:
            if pattern.fullmatch(name):
                return group
        layer = _FUSION_LAYER.fullmatch(name)
        if layer is None:
            return None
        if int(layer[1]) < self.first_fusion_layer:
            return "fusion layers that do not run"
        if layer[2] and int(layer[1]) in self.connected:
            return "cross-attention of connected layers"
        return None

    def contradicts(self, name: str) -> bool:
        """Whether a tensor that the model does not have shows that the file is of another model."""
        return _USED_PARTS.fullmatch(name) is not None
