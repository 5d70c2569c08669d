"""Parameter-efficient fine-tuning of vision transformers, at close to the cost of the matrix products.

model = timm.create_model("vit_base_patch16_224", pretrained=True, num_classes=100)
fastpeft.patch(model, fastpeft.VPT(length=50))
"""

from fastpeft import methods
from fastpeft.ensemble import PromptEnsemble
from fastpeft.errors import FastPEFTError, MethodError, UnsupportedModelError
from fastpeft.fold import fold_prefix
from fastpeft.merge import merge
from fastpeft.methods import *  # noqa: F403
from fastpeft.parameters import parameter_groups, trainable_parameters
from fastpeft.patch import patch, refresh, unpatch
from fastpeft.saving import load, read_config, save
from fastpeft.state import frozen_prefix, get_rng_state, set_rng_state
from fastpeft.summary import Summary, summary

__version__ = "0.1.0"

__all__ = [
    "FastPEFTError",
    "MethodError",
    "PromptEnsemble",
    "Summary",
    "UnsupportedModelError",
    "fold_prefix",
    "frozen_prefix",
    "get_rng_state",
    "load",
    "merge",
    "methods",
    "parameter_groups",
    "patch",
    "read_config",
    "refresh",
    "save",
    "set_rng_state",
    "summary",
    "trainable_parameters",
    "unpatch",
    *[name for name in methods.__all__ if name not in ("REGISTRY", "from_dict")],
]
