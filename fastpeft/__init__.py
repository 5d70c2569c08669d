"""Parameter-efficient fine-tuning of vision transformers, at close to the cost of the matrix products.

    model = timm.create_model("vit_base_patch16_224", pretrained=True, num_classes=100)
    fastpeft.patch(model, fastpeft.VPT(length=50))
"""

from fastpeft import methods
from fastpeft.errors import FastPEFTError, MethodError, UnsupportedModelError
from fastpeft.methods import *  # noqa: F403
from fastpeft.parameters import parameter_groups, trainable_parameters
from fastpeft.patch import patch, refresh, unpatch

__version__ = "0.1.0"

__all__ = [
    "FastPEFTError",
    "MethodError",
    "UnsupportedModelError",
    "methods",
    "parameter_groups",
    "patch",
    "refresh",
    "trainable_parameters",
    "unpatch",
    *[name for name in methods.__all__ if name not in ("REGISTRY", "from_dict")],
]
