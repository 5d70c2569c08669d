"""A rank of a step at ZeRO stage 3, whose peak memory is taken: `bench.scale` starts it through DeepSpeed's launcher.

The plain form is the same method on the model as it is, which DeepSpeed gathers layer by layer: LoRA by Hugging Face's
peft on mPLUG, and the textbook methods on timm's ViT. Attention is torch's fused one in both. Both forms have the same
random weights in bf16 and the same options of stage 3. What is measured is the step: the peak is reset before it.
A CPU without instructions for bf16 takes the products in fp32.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import fastpeft
from bench.literal.build import apply
from bench.scale_parts import products
from fastpeft._compat import import_timm
from fastpeft.models.mplug import MPlug, MPlugConfig
from fastpeft.trainer import launch, precision
from fastpeft.trainer.memory import forget_peak
from fastpeft.trainer.mplug.root import Root, readers_of
from fastpeft.trainer.partitioned import PartitionedStepper
from fastpeft.trainer.stepper import Stepper, state_keys

MODELS = ("vit_huge", "mplug_large", "vit_tiny", "mplug_tiny")
_METHODS = {"vpt": fastpeft.VPT(length=10, dropout=0.0), "lora": fastpeft.LoRA(rank=8, targets=("q", "k"))}
_TIMM = {"vit_huge": "vit_huge_patch14_224", "vit_tiny": "test_vit"}
_STEPS = 3


class Plain(Stepper):
    """Stage 3 with our options and nothing told about the model's blocks."""

    def __init__(self, model: nn.Module, named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self.named, self.optimizer, self.zero = named, optimizer, 3
        self._keys = state_keys(optimizer)
        trained = sum(parameter.numel() for parameter in named.values())
        largest = max(sum(weight.numel() for weight in unit.parameters()) for unit in _units(model))
        options = {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_max_live_parameters": 2 * largest,
            "stage3_prefetch_bucket_size": largest,
            "reduce_bucket_size": trained,
        }
        self._start(model, 1, options)

    def backward(self, loss: torch.Tensor) -> None:
        """Add gradients."""
        self._engine.optimizer.clear_backward_seen_flag()
        super().backward(loss)


def _units(model: nn.Module) -> list[nn.Module]:
    """What is gathered at once in the patched form: blocks, and an embedding with its output layer."""
    lists = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.ModuleDict, nn.Sequential))]
    blocks = [unit for found in lists for unit in found.children()]
    return [*blocks, *(m for m in model.modules() if isinstance(m, nn.Embedding))]


def main() -> None:
    """Take the steps and write `<out>.<rank>.json`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--method", choices=_METHODS, required=True)
    parser.add_argument("--form", choices=("patched", "plain"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--local_rank", type=int, default=0)
    options = parser.parse_args()
    ranks = launch.find_ranks()
    launch.start(ranks)
    model, step = _built(options.model, options.method, options.form)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW([{"params": list(named.values())}], lr=1e-3, fused=True)
    if options.form == "patched":
        readers = readers_of(model) if isinstance(model, Root) else []
        stepper = PartitionedStepper(model, named, optimizer, 1, readers=readers)
    else:
        stepper = Plain(model, named, optimizer)
    _tidy()
    # DeepSpeed records the order of the modules in a step and uses it in the next.
    found = [_measured(stepper, step) for _ in range(_STEPS)]
    summary = {
        "parameters": sum(parameter.ds_numel for parameter in model.parameters()),
        "trained": sum(parameter.ds_numel for parameter in named.values()),
        "steps": found,
        "products": "bf16" if products.native() else "fp32",
        "left_gathered": sum(parameter.numel() for parameter in model.parameters()),
    }
    options.out.with_name(f"{options.out.name}.{ranks.rank}.json").write_text(json.dumps(summary))
    launch.barrier(ranks)
    launch.stop()


def _built(name: str, method: str, form: str) -> tuple[nn.Module, object]:
    """The module that DeepSpeed is given, and what computes a loss with it."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = _empty(name)
    model = _filled(model)
    if form == "patched":
        fastpeft.patch(model, _METHODS[method])
    elif isinstance(model, MPlug):
        import peft

        lora = _METHODS[method]
        wanted = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha or lora.rank, target_modules=["query", "key"])
        model = peft.inject_adapter_in_model(wanted, model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
    else:
        model = apply(model, _METHODS[method])
    precision.cast_frozen(model, torch.bfloat16)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if form == "patched":
        fastpeft.refresh(model)
    model.train()
    if isinstance(model, MPlug):
        return _captioning(model)
    images = torch.randn(1, 3, *model.patch_embed.img_size, dtype=torch.bfloat16)
    return model, lambda: F.cross_entropy(model(images).float(), torch.tensor([1]))


def _empty(name: str) -> nn.Module:
    if name in _TIMM:
        return import_timm().create_model(_TIMM[name], num_classes=10)
    if name == "mplug_large":
        return MPlug(MPlugConfig.large(image_size=224, dropout=0.0, attention_dropout=0.0))
    from bench.scale_parts.runs import _TINY

    return MPlug(MPlugConfig(image_size=32, vocab_size=200, dropout=0.0, attention_dropout=0.0, **_TINY))


def _filled(model: nn.Module) -> nn.Module:
    """Random weights, straight in bf16: an fp32 copy first would be the largest thing that there ever is."""
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.fill_(1.0) if name.endswith("weight") and tensor.ndim == 1 else tensor.uniform_(-0.02, 0.02)
    return model


def _captioning(model: MPlug) -> tuple[nn.Module, object]:
    root = Root(model)
    size = model.config.image_size
    images = torch.randn(1, 3, size, size, dtype=torch.bfloat16)
    ids = torch.randint(103, 199, (1, 12))

    def loss() -> torch.Tensor:
        with torch.no_grad():
            tokens = root.tower(images)
        memory = model.memory(model.project_image(tokens), ids[:, :5])
        return model.token_losses(ids, memory)[0].sum()

    return root, lambda: root.run(loss)


def _measured(stepper: Stepper, step) -> dict[str, float]:
    _tidy()
    before = _status("VmRSS")
    if not forget_peak():
        raise OSError("/proc/self/clear_refs has no effect: the peak of a step cannot be told from those before it")
    started = time.perf_counter()
    with contextlib.nullcontext() if products.native() else products.in_fp32():
        with precision.autocast(torch.device("cpu"), torch.bfloat16):
            loss = step()
        stepper.backward(loss)
        stepper.step()
    return {
        "loss": float(loss),
        "resident_mb": before,
        "peak_mb": _status("VmHWM"),
        "seconds": round(time.perf_counter() - started, 2),
    }


def _tidy() -> None:
    """Give back to the system what is free."""
    gc.collect()
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).malloc_trim(0)


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return round(int(line.split()[1]) / 1024, 1)
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main()
