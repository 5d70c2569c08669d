"""Whole models on disk: published mPLUG checkpoints, and what `MPlug.save` writes.

A tensor that the model uses is in the file, or the file is refused. What the published files have beyond that is left
out by groups and counted: momentum copies, CLIP's text tower, fusion layers that do not run, heads of pre-training.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastpeft.errors import FastPEFTError
from fastpeft.models.mplug.config import MPlugConfig
from fastpeft.models.mplug.files import Checkpoint, read_state, write_state
from fastpeft.models.mplug.fitting import LoadReport, fit, some
from fastpeft.models.mplug.keys import TIED, Layout, by_model_name, published_state

if TYPE_CHECKING:
    from fastpeft.models.mplug.model import MPlug

logger = logging.getLogger(__name__)

# Of CLIP's and BERT's published models; a state dict does not show its number of heads.
_HEAD_WIDTH = 64


def load_checkpoint(path: str | os.PathLike | Checkpoint, model: MPlug) -> LoadReport:
    """Load a whole model, in place.

    Args:
        path: a `.safetensors` file or a torch file, published, fine-tuned with the original code, or written by
            `save_checkpoint`; or what `read_state` gave.
        model: unchanged if the file does not fit. The image tower's position table is brought to its image size.

    Raises:
        FastPEFTError: the file cannot be read, lacks a tensor that the model uses, or is of another model.
    """
    checkpoint = path if isinstance(path, Checkpoint) else read_state(path)
    report = fit(model, by_model_name(checkpoint.state, checkpoint.source), checkpoint.source)
    return dataclasses.replace(report, placeholders=checkpoint.placeholders)


def model_from_checkpoint(
    kind: type[MPlug],
    path: str | os.PathLike,
    image_size: int | None = None,
    config: MPlugConfig | None = None,
    visual_encoder: nn.Module | None = None,
    **known: int,
) -> MPlug:
    """What `MPlug.from_checkpoint` does; arguments as there."""
    checkpoint = read_state(path)
    if config is None:
        config = infer_config(checkpoint, image_size=image_size, **known)
    elif image_size is not None or known:
        config = dataclasses.replace(config, **known, **({} if image_size is None else {"image_size": image_size}))
    if visual_encoder is None:
        # Without initial values: the file has every tensor, or it is refused.
        with torch.device("meta"):
            model = kind(config)
        model.to_empty(device="cpu")
    else:
        model = kind(config, visual_encoder)
    logger.info("%s", load_checkpoint(checkpoint, model))
    return model


def save_checkpoint(model: MPlug, path: str | os.PathLike) -> None:
    """Write a model under the published names, with its sizes beside them.

    An image tower that is not CLIP's keeps timm's names, for which there are no published ones. Torch files also hold
    the second names of the tied tensors, which costs nothing there.

    Args:
        model: without a tuning method's tensors in it.
        path: its suffix says the form: `.safetensors`, or `.pth`, `.pt`, `.bin` with the tensors under `model`.

    Raises:
        FastPEFTError: another suffix, or tensors that are not of the model itself.
    """
    state = model.state_dict()
    strange = _not_its_own(model)
    if strange:
        raise FastPEFTError(
            f"{path}: the model has tensors that are not its own: {some(strange)}; unpatch it first, or save them with "
            "fastpeft.save"
        )
    state = published_state(state)
    if not str(path).endswith(".safetensors"):
        state.update({second: state[name] for second, name in TIED.items()})
    write_state(state, model.config.to_dict(), path)


def infer_config(
    state: dict[str, Tensor] | Checkpoint,
    *,
    image_size: int | None = None,
    num_heads: int | None = None,
    image_heads: int | None = None,
    stride: int | None = None,
) -> MPlugConfig:
    """The sizes of the model that a state dict is of.

    Sizes that the file states are taken from there. Shapes show the others, but for four: heads are 64 wide in both
    CLIP and BERT; text encoder and fusion are one BERT split in two, so of a file's fusion layers the last ones run,
    beginning with the number at which the text encoder ends; and the stride is 3 (base) where the image tower is as
    wide as the text encoder and 6 (large) where it is not.

    Args:
        state: with published names, or the model's own.
        image_size: another than the file's, in pixels.
        num_heads, image_heads, stride: for a model of other sizes than the published ones.

    Raises:
        FastPEFTError: a tensor that shows a size is missing or of an odd shape.
    """
    checkpoint = state if isinstance(state, Checkpoint) else Checkpoint("state dict", state)
    label = checkpoint.source
    given = {"image_size": image_size, "num_heads": num_heads, "image_heads": image_heads, "stride": stride}
    given = {name: value for name, value in given.items() if value is not None}
    if checkpoint.config is not None:
        return MPlugConfig.from_dict({**checkpoint.config, **given})
    shapes = {name: tuple(tensor.shape) for name, (_, tensor, _) in by_model_name(checkpoint.state, label).items()}
    sizes = _sizes(shapes, label)
    sizes["stride"] = 3 if sizes["image_width"] == sizes["width"] else 6
    for heads, width in (("num_heads", "width"), ("image_heads", "image_width")):
        if heads not in given and sizes[width] % _HEAD_WIDTH:
            raise FastPEFTError(f"{label}: {width} is {sizes[width]}, which heads of 64 do not divide; give {heads}")
        sizes[heads] = sizes[width] // _HEAD_WIDTH
    return MPlugConfig(**{**sizes, **given})


def _not_its_own(model: MPlug) -> list[str]:
    """Tensors that a tuning method or a wrapper added, or whose names one changed."""
    from fastpeft.models.mplug.model import MPlug
    from fastpeft.parameters import owners

    with torch.device("meta"):
        plain = MPlug(model.config, _Tower(model.config.image_width)).state_dict()
    return [
        name
        for name, owner in owners(model).items()
        if owner not in ("backbone", "head") or not (name in plain or name.startswith("visual_encoder."))
    ]


class _Tower(nn.Module):
    """An image tower without tensors."""

    def __init__(self, width: int):
        super().__init__()
        self.embed_dim = width


def _sizes(shapes: dict[str, tuple[int, ...]], label: str) -> dict[str, Any]:
    def shape(name: str, axes: int) -> tuple[int, ...]:
        if len(shapes.get(name, ())) != axes:
            what = f"has shape {shapes[name]}" if name in shapes else "is not in it"
            raise FastPEFTError(f"{label}: {name}, which shows the model's sizes, {what}; expected {axes} axes")
        return shapes[name]

    image_width, _, patch, _ = shape("visual_encoder.patch_embed.proj.weight", 4)
    rows = shape("visual_encoder.pos_embed", 3)[1]
    vocab, width = shape("text_encoder.embeddings.word_embeddings.weight", 2)
    text_layers = _layers(shapes, "text_encoder.encoder.layer", label)
    fusion = Layout(shapes)
    fusion_layers = _layers(shapes, "fusion_encoder.encoder.layer", label)
    return {
        "image_size": math.isqrt(max(rows - 1, 0)) * patch,
        "patch_size": patch,
        "image_width": image_width,
        "image_depth": _layers(shapes, "visual_encoder.blocks", label),
        "vocab_size": vocab,
        "width": width,
        "intermediate": shape("text_encoder.encoder.layer.0.intermediate.dense.weight", 2)[0],
        "max_positions": shape("text_encoder.embeddings.position_embeddings.weight", 2)[0],
        "text_layers": text_layers,
        "fusion_layers": fusion_layers - (0 if fusion.first_fusion_layer else text_layers),
        "decoder_layers": _layers(shapes, "text_decoder.bert.encoder.layer", label),
    }


def _layers(shapes: dict[str, tuple[int, ...]], stack: str, label: str) -> int:
    pattern = re.compile(re.escape(stack) + r"\.(\d+)\.")
    numbers = {int(match[1]) for match in map(pattern.match, shapes) if match}
    if not numbers:
        raise FastPEFTError(f"{label}: it has no {stack}.*")
    return len(numbers)
