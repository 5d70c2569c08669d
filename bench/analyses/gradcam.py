"""Grad-CAM on a vision transformer, by captum.

    map = relu(sum over channels c of  a_c * (mean over the grid of d logit / d a_c))

`a` is a layer's output at the image's patches, (d, rows, columns). The class token, register tokens and prompts are no
places of the image: they take part in the forward, and neither in the mean nor in the map.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.analyses.errors import AnalysisError
from bench.analyses.runs import host_of


def default_layer(model: nn.Module) -> str:
    """The first norm of the last block, as a module path: the study's choice.

    What follows it is the last attention, through which the class token reads the patches; the block's output at the
    patches reaches no logit of a model that reads its class token.
    """
    host = host_of(model)
    prefix = next(path for path, module in model.named_modules() if module is host)
    return f"{prefix}.".lstrip(".") + f"blocks.{len(host.blocks) - 1}.norm1"


def grad_cam(model: nn.Module, images: Tensor, targets: Tensor, layer: str | None = None) -> Tensor:
    """Maps of where the evidence for a class is.

    Args:
        model: in evaluation mode, patched or not.
        images: (B, 3, H, W), normalised.
        targets: (B,), classes.
        layer: path of the module whose output is looked at; None for `default_layer`.

    Returns:
        (B, H, W), not negative, in units of the logit; linear between the patches' centres.

    Raises:
        AnalysisError: there is no such layer, its output has no patches, or no logit depends on them.
    """
    from captum.attr import LayerGradCam

    path = layer or default_layer(model)
    try:
        module = model.get_submodule(path)
    except AttributeError:
        raise AnalysisError(
            f"{type(model).__name__} has no layer '{path}'; the default is {default_layer(model)}"
        ) from None
    # With a gradient to the images every layer has one, also below the first parameter that was trained.
    images = images.detach().requires_grad_()
    with _as_plane(host_of(model), module, path, images.shape[-2:]) as plane:
        try:
            maps = LayerGradCam(model, plane).attribute(images, targets, relu_attributions=True)
        except RuntimeError as error:
            if "not to have been used in the graph" not in str(error):
                raise
            raise AnalysisError(f"no logit depends on the output of '{path}' at the patches") from None
    return F.interpolate(maps.detach(), images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


@contextmanager
def _as_plane(host: nn.Module, layer: nn.Module, path: str, size: torch.Size) -> Iterator[nn.Module]:
    """Route a layer's patch rows, as (B, d, rows, columns), through a module that captum can look at."""
    first = host.num_prefix_tokens
    rows, columns = host.patch_embed.dynamic_feat_size(tuple(size))
    last = first + rows * columns
    plane = nn.Identity()

    def route(module: nn.Module, arguments: tuple, output: object) -> Tensor:
        # Prompts come behind the patches, so that the patches' rows are the same whatever the method.
        if not isinstance(output, Tensor) or output.dim() != 3 or output.shape[1] < last:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise AnalysisError(
                f"the output of '{path}' is {shape}; expected (batch, at least {last} tokens, channels) with "
                f"{rows} x {columns} patches after {first} other tokens"
            )
        grid = output[:, first:last].transpose(1, 2).unflatten(2, (rows, columns))
        return torch.cat((output[:, :first], plane(grid).flatten(2).transpose(1, 2), output[:, last:]), dim=1)

    handle = layer.register_forward_hook(route)
    try:
        yield plane
    finally:
        handle.remove()
