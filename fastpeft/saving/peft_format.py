"""LoRA in the layout of Hugging Face peft.

peft has one pair of factors a module. Slices q, k, v of a fused projection with their own A and B become one pair of
rank n * r: A stacked, B block-structured, with alpha scaled so that alpha / rank stays. This is exact.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.engine.description import BlockSpec, HostSpec
from fastpeft.errors import FastPEFTError, MethodError
from fastpeft.methods.base import Method
from fastpeft.methods.lora import LoRA
from fastpeft.models.families import find_hosts

_ROOT = "base_model.model."
KEYS = {"peft_type", "r", "lora_alpha", "target_modules", "modules_to_save"}


def fits(method: Method) -> bool:
    """Whether the method is one that peft has: LoRA alone."""
    return isinstance(method, LoRA)


def _host(model: nn.Module) -> tuple[str, HostSpec]:
    """Path prefix and description of the one transformer in a model, patched or not."""
    found = find_hosts(model)
    if len(found) != 1:
        raise MethodError(f"an adapter goes to one transformer, but {type(model).__name__} holds {len(found)}")
    path, host, family = found[0]
    return (f"{path}." if path else ""), family.describe(host)


def _by_layer(spec: BlockSpec, roles: tuple[str, ...]) -> dict[str, list[str]]:
    """Module path -> the roles that lie in it, in the order of their columns."""
    layers: dict[str, list[str]] = {}
    for role in sorted(roles, key=lambda role: spec.roles[role].start):
        layers.setdefault(spec.roles[role].path, []).append(role)
    return layers


def to_peft(model: nn.Module, method: LoRA, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config entries and tensors as peft names and shapes them."""
    prefix, spec = _host(model)
    out = {}
    ranks: dict[str, int] = {}
    for block, block_spec in spec.blocks:
        for layer, roles in _by_layer(block_spec, method.targets).items():
            stem = f"{prefix}{block}.lora."
            places = [block_spec.roles[role] for role in roles]
            width = max(p.stop for p in block_spec.roles.values() if p.path == layer)
            a = torch.cat([tensors[f"{stem}{role}.A"] for role in roles])
            b = torch.zeros(width, a.shape[0], dtype=a.dtype)
            for index, (role, place) in enumerate(zip(roles, places, strict=True)):
                columns = slice(index * method.rank, (index + 1) * method.rank)
                b[place.start : place.stop, columns] = tensors[f"{stem}{role}.B"].cpu()
            name = f"{_ROOT}{prefix}{block}.{layer}"
            out[f"{name}.lora_A.weight"], out[f"{name}.lora_B.weight"] = a, b
            ranks[f"{prefix}{block}.{layer}"] = a.shape[0]
    heads = sorted({name.rsplit(".", 1)[0] for name in tensors if ".lora." not in name})
    for name, tensor in tensors.items():
        if ".lora." not in name:
            out[_ROOT + name] = tensor
    patterns = {path: rank for path, rank in ranks.items() if rank != method.rank}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "r": method.rank,
        "lora_alpha": method.scale * method.rank,
        "lora_dropout": method.dropout,
        "bias": "none",
        "target_modules": sorted(ranks),
        "modules_to_save": heads or None,
        "rank_pattern": patterns,
        "alpha_pattern": {path: method.scale * rank for path, rank in patterns.items()},
    }
    return config, out


def to_own_names(tensors: dict[str, Tensor], method: LoRA, model: nn.Module) -> dict[str, Tensor]:
    """The tensors that `to_peft` wrote, by fastpeft's names."""
    prefix, spec = _host(model)
    out = {}
    for block, block_spec in spec.blocks:
        for role in method.targets:
            if role not in block_spec.roles:
                raise MethodError(f"LoRA: {block} has no projection {role!r}; it has: {', '.join(block_spec.roles)}")
        for layer, roles in _by_layer(block_spec, method.targets).items():
            name = f"{_ROOT}{prefix}{block}.{layer}"
            try:
                a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
            except KeyError as error:
                raise FastPEFTError(f"the adapter lacks {error.args[0]}") from None
            for index, role in enumerate(roles):
                place, columns = block_spec.roles[role], slice(index * method.rank, (index + 1) * method.rank)
                out[f"{prefix}{block}.lora.{role}.A"] = a[columns].contiguous()
                out[f"{prefix}{block}.lora.{role}.B"] = b[place.start : place.stop, columns].contiguous()
    rest = {name: t for name, t in tensors.items() if ".lora_A." not in name and ".lora_B." not in name}
    return out | {name.removeprefix(_ROOT): t for name, t in rest.items()}


def from_peft(
    config: dict[str, Any], tensors: dict[str, Tensor], model: nn.Module
) -> tuple[LoRA, bool, dict[str, Tensor]]:
    """Method, train_head and tensors of a folder that peft wrote.

    Raises:
        FastPEFTError: it is not plain LoRA of one rank on projections of every block, said which way.
    """
    if config.get("peft_type") != "LORA":
        raise FastPEFTError(f"a peft adapter of type {config.get('peft_type')!r} cannot be loaded; only LORA can")
    for option in ("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias", "layer_replication", "rank_pattern"):
        if config.get(option):
            raise FastPEFTError(f"a peft adapter with {option} cannot be loaded; patch the peft model itself instead")
    if config.get("bias", "none") != "none" or config.get("alpha_pattern"):
        raise FastPEFTError("a peft adapter with trained biases or alpha_pattern cannot be loaded")
    prefix, spec = _host(model)
    pattern = re.compile(re.escape(_ROOT + prefix) + r"(.+)\.lora_(A|B)\.weight")
    placed = {
        f"{block}.{p.path}": (block, block_spec) for block, block_spec in spec.blocks for p in block_spec.roles.values()
    }
    out, found = {}, set()
    for name, tensor in tensors.items():
        match = pattern.fullmatch(name)
        if match is None:
            if ".lora_" in name:
                raise FastPEFTError(f"{name} is outside of the model's blocks")
            out[name.removeprefix(_ROOT).replace(".modules_to_save.default", "")] = tensor
            continue
        layer, factor = match.groups()
        if layer not in placed:
            raise FastPEFTError(f"{name} is not on a projection that fastpeft runs")
        block, block_spec = placed[layer]
        # A pair for the whole layer: the role that spans it.
        roles = {r: p for r, p in block_spec.roles.items() if f"{block}.{p.path}" == layer}
        role = max(roles, key=lambda r: roles[r].out_features)
        out[f"{prefix}{block}.lora.{role}.{factor}"] = tensor
        found.add((block, role))
    targets = tuple(sorted({role for _, role in found}))
    if len(found) != len(targets) * len(spec.blocks):
        raise FastPEFTError("the peft adapter is not on every block; patch the peft model itself instead")
    method = LoRA(config["r"], config["lora_alpha"], targets, config.get("lora_dropout", 0.0))
    return method, any(".lora." not in name for name in out), out
