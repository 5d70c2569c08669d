"""The type of a method's tensors: at least fp32, also on a model in half precision."""

from __future__ import annotations

import torch
from torch import Tensor


def master_copy_of(weight: Tensor) -> Tensor:
    """Return an empty tensor on the weight's device: fp32 for a half-precision weight, else of its own type."""
    return weight.new_empty(0, dtype=torch.promote_types(weight.dtype, torch.float32))
