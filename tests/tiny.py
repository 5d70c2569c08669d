"""Small vision transformers that differ in one thing each, and the methods, at sizes that fit them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastpeft
from fastpeft._compat import import_timm
from fastpeft.parameters import owners

timm = import_timm()

from timm.layers import RmsNorm, SwiGLUPacked  # noqa: E402
from timm.models.deit import VisionTransformerDistilled  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

DIM, CLASSES, SIZE, PATCH = 32, 5, 32, 8

VARIANTS: dict[str, dict] = {
    "class_token": {},
    "no_class_token": {"class_token": False, "global_pool": "avg"},
    "average_pool": {"global_pool": "avg"},
    "average_with_prefix": {"global_pool": "avg", "pool_include_prefix": True},
    "max_pool": {"global_pool": "max"},
    "map_pool": {"class_token": False, "global_pool": "map"},
    "registers": {"reg_tokens": 4, "no_embed_class": True},
    "registers_only": {"class_token": False, "reg_tokens": 2, "global_pool": "avg"},
    "layer_scale": {"init_values": 0.1},
    "qk_norm": {"qk_norm": True},
    "scale_norm": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "pre_norm": {"pre_norm": True},
    "rms_norm": {"norm_layer": RmsNorm},
    "no_biases": {"qkv_bias": False, "proj_bias": False},
    "distilled": {"cls": VisionTransformerDistilled},
    "dynamic_size": {"dynamic_img_size": True, "resolution": (40, 24)},
    "gated_mlp": {"mlp_layer": SwiGLUPacked},
    "oblong": {"img_size": (16, 48), "resolution": (16, 48)},
}


def vit(variant: str = "class_token", *, seed: int = 0, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """A small model with random weights; no zeros or ones that would hide a missing bias or scale.

    Args:
        variant: key of `VARIANTS`.
        seed: of the weights.
        dtype: of the weights, which are drawn in float32.
        **options: of the model's constructor.
    """
    chosen = {**VARIANTS[variant], **options}
    chosen.pop("resolution", None)
    cls = chosen.pop("cls", VisionTransformer)
    sizes = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": DIM, "depth": 3, "num_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(**{**sizes, "num_classes": CLASSES, **chosen})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype)


def images(variant: str = "class_token", batch: int = 3, *, seed: int = 1, dtype=torch.float32) -> Tensor:
    """A batch at the variant's resolution."""
    height, width = VARIANTS[variant].get("resolution", (SIZE, SIZE))
    values = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype)


def labels(batch: int = 3) -> Tensor:
    """Class numbers."""
    return torch.arange(batch) % CLASSES


# Every method and every way it can be set that changes the mathematics, at sizes that fit; sums where parts could meet.
METHODS: dict[str, fastpeft.methods.Method] = {
    "full": fastpeft.Full(),
    "linear": fastpeft.Linear(),
    "partial-1": fastpeft.Partial(1),
    "partial-2": fastpeft.Partial(2),
    "mlp-3": fastpeft.MLPHead(3),
    "bitfit": fastpeft.BitFit(),
    "vpt-deep": fastpeft.VPT(4),
    "vpt-deep-batch-mask": fastpeft.VPT(4, dropout=0.3, dropout_mask="batch"),
    "vpt-shallow": fastpeft.VPT(4, deep=False),
    "vpt-shallow-dropout": fastpeft.VPT(4, deep=False, dropout=0.3),
    "vpt-first-two": fastpeft.VPT(4, depth=(1, 2)),
    "vpt-last-two": fastpeft.VPT(4, depth=(2, 3)),
    "vpt-middle": fastpeft.VPT(1, depth=(2, 2)),
    "vpt-share-intra": fastpeft.VPT(4, share="intra"),
    "vpt-share-inter": fastpeft.VPT(4, share="inter"),
    "vpt-share-all": fastpeft.VPT(4, share="all", dropout_mask="batch"),
    "vpt-fixed": fastpeft.VPT(4, trained=False),
    "class-token": fastpeft.ClassToken(),
    "prefix-kv": fastpeft.PrefixTuning(4),
    "prefix-mlp": fastpeft.PrefixTuning(4, mlp=8),
    "prefix-hidden": fastpeft.PrefixTuning(4, form="hidden"),
    "lora-q-v": fastpeft.LoRA(2),
    "lora-k": fastpeft.LoRA(3, targets=("k",)),
    "lora-qkv": fastpeft.LoRA(2, alpha=3, targets=("qkv",)),
    "lora-all": fastpeft.LoRA(2, alpha=5, targets=("q", "k", "v", "o", "fc1", "fc2")),
    "lora-dropout": fastpeft.LoRA(2, targets=("q", "v", "o", "fc1", "fc2"), dropout=0.3),
    "adapter": fastpeft.Adapter(8),
    "adapter-released": fastpeft.Adapter(8, init="released"),
    "serial": fastpeft.SerialAdapter(24),
    "serial-ffn-bias": fastpeft.SerialAdapter(24, bias=True, locations=("ffn",)),
    "parallel": fastpeft.ParallelAdapter(24),
    "parallel-skip": fastpeft.ParallelAdapter(24, bias=True, skip=True, scale=0.5, locations=("attn",)),
    "vpt+bitfit": fastpeft.VPT(4) + fastpeft.BitFit(),
    "vpt+full": fastpeft.VPT(4) + fastpeft.Full(),
    "vpt+lora": fastpeft.VPT(4) + fastpeft.LoRA(2, targets=("q", "k", "v", "fc1")),
    "vpt-shallow+lora": fastpeft.VPT(4, deep=False) + fastpeft.LoRA(2),
    "vpt-first-two+prefix": fastpeft.VPT(2, depth=(1, 2)) + fastpeft.PrefixTuning(3),
    "vpt+prefix-hidden": fastpeft.VPT(2, dropout_mask="batch") + fastpeft.PrefixTuning(3, form="hidden"),
    "prefix+adapter": fastpeft.PrefixTuning(4) + fastpeft.Adapter(8),
    "serial+parallel": fastpeft.SerialAdapter(24) + fastpeft.ParallelAdapter(16),
    "lora+partial": fastpeft.LoRA(2) + fastpeft.Partial(1),
    "bitfit+mlp": fastpeft.BitFit() + fastpeft.MLPHead(2),
}

# One of each kind, for what is repeated over many variants, types or features.
FEW = ("bitfit", "vpt-deep", "vpt-shallow", "prefix-kv", "lora-all", "adapter", "parallel", "vpt+lora")


def fits(method: fastpeft.methods.Method, variant: str) -> bool:
    """Whether the variant has what the method acts on.

    Roles "fc1" and "fc2" are out of reach in a gated MLP; a class token is where the head reads one.
    """
    if any(part.name == "class_token" for part in method.parts()):
        return VARIANTS[variant].get("global_pool", "token") == "token"
    roles = [role for part in method.parts() if part.name == "lora" for role in part.targets]
    return variant != "gated_mlp" or not {"fc1", "fc2"} & set(roles)


def randomise(model: nn.Module, seed: int = 0, scale: float = 0.3) -> nn.Module:
    """Give every tensor that a method added a random value: several start at zero and would hide themselves."""
    generator = torch.Generator().manual_seed(seed)
    owner = owners(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if owner.get(name, "backbone") not in ("backbone", "head"):
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def patched(method, variant: str = "class_token", *, dtype=torch.float32, scale=0.3, **options) -> nn.Module:
    """A patched model whose method tensors are random; they are fp32 masters unless the model is float64."""
    model = fastpeft.patch(vit(variant, dtype=dtype, **options), method)
    return randomise(model.double() if dtype == torch.float64 else model, scale=scale)
