"""Integrated Gradients, by captum.

    attribution_i = (x_i - b_i) * integral over t in [0, 1] of  d logit / d x_i  at  b + t (x - b)

Their sum is logit(x) - logit(b). What the sum of finitely many steps misses of it is reported with every image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Integrated:
    """Attributions.

    Attributes:
        values: (B, 3, H, W), in units of the logit.
        difference: (B,), of the image's logit from the baseline's.
        missed: (B,), the sum of the values minus that difference.
    """

    values: Tensor
    difference: Tensor
    missed: Tensor

    @property
    def share_missed(self) -> Tensor:
        """(B,), of the difference."""
        return self.missed.abs() / self.difference.abs().clamp_min(torch.finfo(self.difference.dtype).tiny)


def integrated_gradients(
    model: nn.Module, images: Tensor, targets: Tensor, baseline: Tensor, steps: int = 128, batch_size: int = 64
) -> Integrated:
    """Attribute a class's logit to the pixels.

    Args:
        model: in evaluation mode, patched or not.
        images: (B, 3, H, W), normalised.
        targets: (B,), classes.
        baseline: broadcastable to the images, normalised: what "nothing to see" is.
        steps: points of a Gauss-Legendre rule along the path.
        batch_size: images at once, points counted as images.
    """
    from captum.attr import IntegratedGradients

    baseline = baseline.to(images).expand_as(images)
    values = IntegratedGradients(model).attribute(
        images,
        baseline,
        targets,
        n_steps=steps,
        method="gausslegendre",
        internal_batch_size=max(batch_size, len(images)),
    )
    with torch.no_grad():
        rows = torch.arange(len(images), device=images.device)
        difference = (model(images) - model(baseline))[rows, targets]
    values = values.detach().to(images.dtype)
    return Integrated(values, difference, values.flatten(1).sum(1) - difference)
