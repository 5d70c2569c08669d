"""The training steps that benchmarks and on-device checks share: one factory for fused, literal and peft models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastpeft
from bench import literal
from fastpeft._compat import import_timm

# Method by row name. The first twelve are the rows of the VPT paper's cost table (less side-tuning).
METHODS: dict[str, Callable[[], Any]] = {
    "full": lambda: fastpeft.Full(),
    "linear": lambda: fastpeft.Linear(),
    "partial-1": lambda: fastpeft.Partial(1),
    "mlp-3": lambda: fastpeft.MLPHead(3),
    "bias": lambda: fastpeft.BitFit(),
    "adapter-8": lambda: fastpeft.Adapter(8),
    "adapter-64": lambda: fastpeft.Adapter(64),
    "adapter-256": lambda: fastpeft.Adapter(256),
    "vpt-shallow-1": lambda: fastpeft.VPT(1, deep=False),
    "vpt-shallow-200": lambda: fastpeft.VPT(200, deep=False),
    "vpt-deep-1": lambda: fastpeft.VPT(1),
    "vpt-deep-200": lambda: fastpeft.VPT(200),
    "vpt-deep-10": lambda: fastpeft.VPT(10),
    "vpt-deep-200-batch-mask": lambda: fastpeft.VPT(200, dropout_mask="batch"),
    "vpt-deep-10+bias": lambda: fastpeft.VPT(10) + fastpeft.BitFit(),
    "vpt-middle-10": lambda: fastpeft.VPT(10, depth=(2, 2)),
    "prefix-10": lambda: fastpeft.PrefixTuning(10),
    "prefix-hidden-10": lambda: fastpeft.PrefixTuning(10, form="hidden"),
    "lora-qkv-8": lambda: fastpeft.LoRA(8, targets=("q", "k", "v")),
    "lora-all-8": lambda: fastpeft.LoRA(8, targets=("q", "k", "v", "o", "fc1", "fc2")),
    "serial-64": lambda: fastpeft.SerialAdapter(64),
    "parallel-64": lambda: fastpeft.ParallelAdapter(64),
}

VARIANTS = ("fused", "literal", "peft")


def create_model(name: str, classes: int = 100, image_size: int = 224, **options: Any) -> nn.Module:
    """Create a timm model with random weights, drawn from a fixed seed; no zeros that would hide a missing term."""
    timm = import_timm()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=classes, img_size=image_size, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def build(variant: str, method: Any, model: nn.Module) -> nn.Module:
    """Return a copy of a plain model under a method: "fused" by the library, "literal", or by Hugging Face "peft".

    Raises:
        ValueError: The variant is unknown, or peft has no such method.
    """
    model = copy.deepcopy(model)
    if variant == "fused":
        return fastpeft.patch(model, method)
    if variant == "literal":
        return literal.apply(model, method)
    if variant == "peft" and has_peft(method):
        import peft

        config = peft.LoraConfig(
            r=method.rank,
            lora_alpha=method.rank,
            target_modules=["qkv", "proj", "fc1", "fc2"] if "fc1" in method.targets else ["qkv"],
            exclude_modules=r"patch_embed\..*",
            modules_to_save=["head"],
        )
        return peft.get_peft_model(model, config)
    raise ValueError(f"no variant {variant!r} of {method}; there are {VARIANTS}, the last for LoRA only")


def has_peft(method: Any) -> bool:
    """Tell whether Hugging Face peft offers the method for a timm vision transformer."""
    return getattr(method, "name", None) == "lora"


def batch(
    count: int, image_size: int, classes: int, dtype: torch.dtype, device: torch.device | str, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """Return random images and labels of a batch, drawn from a seed; each image has colours of its own."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, image_size, image_size, generator=generator)
    # Noise alone looks alike to a network: batch normalisation would then divide by next to nothing.
    images += 2 * torch.randn(count, 3, 1, 1, generator=generator)
    labels = torch.randint(classes, (count,), generator=generator)
    return images.to(device, dtype), labels.to(device)


class TrainingStep:
    """One training step after another: forward, cross-entropy, backward, AdamW, gradients freed.

    Attributes:
        model: in training mode.
        optimizer: over its trained parameters.
        images, labels: the batch.
        compiled: whether torch.compile runs the model.
    """

    def __init__(
        self, model: nn.Module, images: Tensor, labels: Tensor, *, compile_options: Mapping[str, Any] | None = None
    ) -> None:
        """Prepare a step.

        Args:
            model: Any variant; put into training mode.
            images: A batch on the model's device, of its type.
            labels: Class numbers.
            compile_options: Of torch.compile; the model is not compiled if None.
        """
        self.model = model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        self.images, self.labels = images, labels
        self.compiled = compile_options is not None
        self._forward = model if compile_options is None else torch.compile(model, **compile_options)

    def forward(self) -> Tensor:
        """The forward pass alone, as the step runs it."""
        return self._forward(self.images)

    def loss(self) -> Tensor:
        """The forward pass and the loss."""
        return F.cross_entropy(self.forward().float(), self.labels)

    def __call__(self) -> Tensor:
        """Take a step; returns the loss before it."""
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def token_rows(model: nn.Module, images: int) -> int:
    """Return the token rows of a batch of `images`, prompts not counted."""
    return images * (model.patch_embed.num_patches + model.num_prefix_tokens)
