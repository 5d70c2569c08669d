"""Parameter groups with their own learning rates, the two optimizers of the protocols, and the schedule."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable

import torch
from torch import nn

from fastpeft.config import ConfigError, Optimisation, TrainConfig

# The last layer's bias where that predicts words, as BERT and mPLUG call it.
_VOCABULARY_BIAS = "cls.predictions.bias"

Groups = dict[str, list[tuple[str, nn.Parameter]]]


def base_rates(groups: Groups, train: Optimisation) -> dict[str, float]:
    """The full learning rate of every group that is trained.

    Raises:
        ConfigError: `train.lr` names a group that is not there, or leaves one out without a `train.base_lr`.
    """
    for name in train.lr:
        if name not in groups:
            near = difflib.get_close_matches(name, groups, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"this run trains: {', '.join(sorted(groups))}"
            raise ConfigError(f"train.lr.{name}: no such parameter group; {hint}")
    scale = train.batch_size / 256 if train.scale_lr else 1.0
    rates = {}
    for name in groups:
        if name not in train.lr and train.base_lr is None:
            raise ConfigError(f"train.lr: no rate for group '{name}'; add train.lr.{name} or train.base_lr")
        rates[name] = train.lr[name] if name in train.lr else train.base_lr * scale
    return rates


def build_optimizer(groups: Groups, num_classes: int, train: Optimisation) -> torch.optim.Optimizer:
    """SGD or AdamW over the groups; each torch group remembers its full rate as `base_lr`.

    Torch's fused ones, which read and write each number once; with `train.cuda_graph` such that a recorded step finds
    rates and step counts in tensors.
    """
    rates = base_rates(groups, train)
    torch_groups = []
    for name, members in groups.items():
        decayed = [parameter for full_name, parameter in members if _decays(full_name, parameter, num_classes, train)]
        kept = [parameter for full_name, parameter in members if not _decays(full_name, parameter, num_classes, train)]
        for parameters, decay in ((decayed, train.weight_decay), (kept, 0.0)):
            if parameters:
                rate = rates[name]
                torch_groups.append(
                    {"params": parameters, "lr": rate, "base_lr": rate, "weight_decay": decay, "name": name}
                )
    devices = {parameter.device for group in torch_groups for parameter in group["params"]}
    options = {"fused": True} if all(device.type in ("cuda", "cpu") for device in devices) else {}
    if train.cuda_graph:
        for group in torch_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=next(iter(devices)))
        if train.optimizer == "adamw":
            options["capturable"] = True
    if train.optimizer == "sgd":
        return torch.optim.SGD(torch_groups, lr=0.0, momentum=train.momentum, **options)
    return torch.optim.AdamW(torch_groups, lr=0.0, eps=train.eps, **options)


def _decays(name: str, parameter: nn.Parameter, num_classes: int, train: Optimisation) -> bool:
    """The protocols' rule: SGD spares the last layer's bias, AdamW every bias."""
    if train.optimizer == "adamw":
        return "bias" not in name and (parameter.ndim > 1 or not train.spares_vectors)
    classifier = name.startswith("head") and name.endswith("bias") and parameter.shape == (num_classes,)
    return not (classifier or name.endswith(_VOCABULARY_BIAS))


def rate_factor(train: TrainConfig, epoch: int, step: int, steps: int) -> float:
    """The share of the full rate for a step of an epoch, both counted from 0; `steps` are those of an epoch."""
    if train.schedule_by == "epoch":
        now, warmup, total = epoch, train.warmup_epochs, train.epochs
    else:
        now, warmup, total = epoch * steps + step, train.warmup_epochs * steps, train.epochs * steps
    if now < warmup:
        return (now + 1) / warmup
    if train.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (now - warmup) / (total - warmup)))


def stepwise_rate(base: float, step: int, total: int, warmup: int, lowest: float, schedule: str, start: float) -> float:
    """The rate of a step, counted from 0: linear from `start` to `base`, then a cosine to `lowest`, or `base`.

    The first step takes one part of the way up, so that it is not lost where `start` is 0.
    """
    if step < warmup:
        return start + (base - start) * (step + 1) / warmup
    if schedule == "constant":
        return base
    return lowest + (base - lowest) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group its full rate times `factor`."""
    apply_rates(optimizer, lambda base: base * factor)


def apply_rates(optimizer: torch.optim.Optimizer, rate_of: Callable[[float], float]) -> None:
    """Give every group what `rate_of` makes of its full rate."""
    for group in optimizer.param_groups:
        rate = rate_of(group["base_lr"])
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
