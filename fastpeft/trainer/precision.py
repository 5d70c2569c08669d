"""Number formats: which one the hardware is good at, frozen weights in it, and the loss scale that fp16 needs."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
import torch.distributed
from torch import nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose(precision: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The format of frozen weights and activations, and why: `auto` asks the hardware."""
    if precision != "auto":
        return DTYPES[precision], f"{precision}, as configured"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "bf16, which this GPU multiplies natively"
        return torch.float32, "fp32, as this GPU has no bf16"
    flags = _cpu_flags()
    for flag in ("amx_bf16", "avx512_bf16"):
        if flag in flags:
            return torch.bfloat16, f"bf16, as this CPU has {flag}"
    return torch.float32, "fp32, as this CPU has neither amx_bf16 nor avx512_bf16"


def _cpu_flags() -> set[str]:
    """The processor's feature flags; empty where the system does not list them."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    return set()


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Put frozen parameters into `dtype`; trained ones stay fp32 masters, and buffers stay as they are.

    A matrix product is happy with a frozen weight beside a trained bias. A normalisation wants both in one format, so
    where its bias is trained its frozen weight stays fp32 too.
    """
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        products = (nn.Linear, nn.modules.conv._ConvNd)
        if not isinstance(module, products) and len({parameter.requires_grad for parameter in own}) > 1:
            continue
        for parameter in own:
            if not parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Run the model in `dtype`; nothing to do for fp32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


class LossScale:
    """The dynamic loss scale of fp16: halved when a gradient overflows, doubled after a quiet while.

    Gradients are unscaled as soon as they reach an fp32 master, before anything adds them up, so an optimizer never
    sees the scale. With scaling off every call is a no-op.
    """

    GROW_AFTER = 1000
    SMALLEST = 2.0**-14

    def __init__(self, parameters: list[nn.Parameter], enabled: bool) -> None:
        self.enabled = enabled
        self.scale = 2.0**16 if enabled else 1.0
        self.quiet_steps = 0
        self._parameters = parameters

    def unscale(self) -> bool:
        """Divide the gradients by the scale; False if any rank's overflowed, and then no step may be taken."""
        if not self.enabled:
            return True
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        torch._foreach_mul_(gradients, 1.0 / self.scale)
        finite = torch.stack([gradient.isfinite().all() for gradient in gradients]).all().float()
        if torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
        return bool(finite)

    @property
    def exhausted(self) -> bool:
        """Whether the scale cannot be halved any more: an overflow is then the gradients' own."""
        return self.enabled and self.scale <= self.SMALLEST

    def update(self, stepped: bool) -> None:
        """Adapt the scale after a step that was taken or skipped."""
        if not self.enabled:
            return
        self.quiet_steps = self.quiet_steps + 1 if stepped else 0
        if not stepped:
            self.scale = max(self.scale / 2, self.SMALLEST)
        elif self.quiet_steps == self.GROW_AFTER:
            self.scale, self.quiet_steps = self.scale * 2, 0

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"scale": self.scale, "quiet_steps": self.quiet_steps}

    def load(self, state: dict[str, float]) -> None:
        """Continue from a checkpoint's state."""
        self.scale, self.quiet_steps = state["scale"], int(state["quiet_steps"])
