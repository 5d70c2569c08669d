"""Imports that need a hand on some machines."""

from __future__ import annotations

import importlib
from types import ModuleType

# Kept alive for the life of the process: torch forgets a library's operators when the object is collected.
_schemas = None


def import_timm() -> ModuleType:
    """Import timm, also where torchvision's compiled operators are missing.

    torchvision has no build that matches a CPU build of torch, and then fails on import with "operator torchvision::nms
    does not exist". timm needs only torchvision's Python part, so declaring the two operators is enough.

    Returns:
        The `timm` module.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    ensure_torchvision()
    return importlib.import_module("timm")


def ensure_torchvision() -> None:
    """Make `import torchvision` work where only its compiled operators are missing."""
    global _schemas
    if _schemas is not None:
        return
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        import torch

        _schemas = torch.library.Library("torchvision", "DEF")
        _schemas.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _schemas.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")
