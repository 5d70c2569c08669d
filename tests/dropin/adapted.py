"""Small transformers that carry adapters of Hugging Face peft with random weights."""

from __future__ import annotations

import copy

import torch
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    get_peft_model,
)
from torch import nn

from tests.tiny import vit

ALL = ["qkv", "attn.proj", "fc1", "fc2"]
PREFIX = "base_model.model."

# Plain LoRA: every layer in the blocks is fused. The second entry is what lies outside of the blocks.
FUSED: dict[str, tuple[dict, set[str]]] = {
    "qkv": ({"target_modules": ["qkv"]}, set()),
    "proj": ({"target_modules": ["attn.proj"]}, set()),
    "mlp": ({"target_modules": ["fc1", "fc2"], "lora_alpha": 3}, set()),
    "all": ({"target_modules": ALL}, set()),
    "with head": ({"target_modules": ALL, "modules_to_save": ["head"]}, {"head"}),
    "on the head": ({"target_modules": ["qkv", "head"]}, {"head"}),
    "all linear": ({"target_modules": "all-linear"}, {"head"}),
    "convolution": ({"target_modules": ["fc1", "patch_embed.proj"]}, {"patch_embed.proj"}),
    "norms saved": ({"target_modules": ["qkv"], "modules_to_save": ["norm1"]}, {f"blocks.{i}.norm1" for i in range(3)}),
    "rslora": ({"target_modules": ["qkv", "fc2"], "use_rslora": True}, set()),
    "lora bias": ({"target_modules": ALL, "lora_bias": True}, set()),
    "biases trained": ({"target_modules": ["qkv"], "bias": "all"}, set()),
    "lora's biases trained": ({"target_modules": ["qkv"], "bias": "lora_only"}, set()),
    "one block": ({"target_modules": ["qkv"], "layers_to_transform": [1], "layers_pattern": "blocks"}, set()),
    "fan_in_fan_out asked for": ({"target_modules": ALL, "fan_in_fan_out": True}, set()),
    "patterns": (
        {"target_modules": ["qkv", "fc1"], "rank_pattern": {"fc1": 2}, "alpha_pattern": {"blocks.1.attn.qkv": 7}},
        set(),
    ),
    "dropout": ({"target_modules": ALL, "lora_dropout": 0.3}, set()),
    "gaussian": ({"target_modules": ["qkv"], "init_lora_weights": "gaussian"}, set()),
    "pissa": ({"target_modules": ["qkv"], "init_lora_weights": "pissa"}, set()),
}

# What is not plain LoRA on a plain linear layer is called as a module: configuration, one path that is listed, reason.
QKV = "blocks.0.attn.qkv"
LEFT_ALONE: dict[str, tuple[object, str, str]] = {
    "DoRA": (LoraConfig(r=4, target_modules=ALL, use_dora=True), QKV, "is peft's Dora, not plain LoRA"),
    "a parameter's LoRA": (LoraConfig(r=4, target_modules=[], target_parameters=["qkv.weight"]), QKV, "ParamWrapper"),
    "saved qkv": (LoraConfig(r=4, target_modules=["fc1"], modules_to_save=["qkv"]), QKV, "ModulesToSaveWrapper"),
    "saved mlp": (LoraConfig(r=4, target_modules=["qkv"], modules_to_save=["mlp"]), "blocks.0.mlp", "two-layer MLP"),
    "saved attn": (
        LoraConfig(r=4, target_modules=["fc1"], modules_to_save=["attn"]),
        "blocks.0",
        "ModulesToSaveWrapper",
    ),
    "LoHa": (LoHaConfig(r=4, target_modules=ALL), QKV, "loha.layer.Linear"),
    "LoHa with dropout": (
        LoHaConfig(r=4, target_modules=ALL, rank_dropout=0.4, module_dropout=0.2),
        QKV,
        "loha.layer.Linear",
    ),
    "LoKr": (LoKrConfig(r=4, target_modules=ALL), QKV, "lokr.layer.Linear"),
    "IA3": (IA3Config(target_modules=["qkv", "fc2"], feedforward_modules=["fc2"]), QKV, "ia3.layer.Linear"),
    "OFT": (OFTConfig(r=4, oft_block_size=0, target_modules=ALL, module_dropout=0.3), QKV, "oft.layer.Linear"),
    "BOFT": (BOFTConfig(boft_block_size=4, target_modules=["qkv", "fc1"]), QKV, "boft.layer.Linear"),
    "AdaLoRA": (
        AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=ALL, lora_dropout=0.2),
        QKV,
        "adalora.layer.SVDLinear",
    ),
    "LN tuning": (LNTuningConfig(target_modules=["norm1"]), "blocks.0.norm1", "LNTuningLayer, outside of the layers"),
}


def lora(**options) -> LoraConfig:
    """A LoRA configuration of rank 4."""
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["qkv"], **copy.deepcopy(options)})


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every adapter weight and every trained one a random value: peft starts as the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def adapted(config, variant: str = "class_token", dtype: torch.dtype = torch.float64, **options) -> PeftModel:
    """A PeftModel of one type throughout."""
    return randomise(get_peft_model(vit(variant, **options), copy.deepcopy(config)).to(dtype))
