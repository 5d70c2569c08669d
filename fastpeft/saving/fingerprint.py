"""A short name for the values of frozen weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, shapes and values rounded to bfloat16.

    Rounded, so that a base model loaded in fp32 and in bf16 has the same fingerprint.

    Args:
        tensors: (name, tensor), in any order.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        value = tensor.detach().cpu()
        if value.is_floating_point():
            value = value.to(torch.bfloat16).contiguous().view(torch.int16)
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()
