"""LoRA in the layout of Hugging Face peft.

peft has one pair of factors a module. Slices q, k, v of a fused projection with their own A and B become one pair of
rank n * r: A stacked, B block-structured, with alpha scaled so that alpha / rank stays. This is exact.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.engine.description import BlockSpec, HostSpec
from fastpeft.errors import FastPEFTError, MethodError
from fastpeft.methods.base import Method
from fastpeft.methods.lora import LoRA
from fastpeft.models.families import find_hosts

_ROOT = "base_model.model."

# Entries of peft's config that `to_peft` writes; metadata must not take their names.
KEYS = frozenset(
    "peft_type task_type inference_mode r lora_alpha lora_dropout bias init_lora_weights target_modules "
    "modules_to_save rank_pattern alpha_pattern".split()
)
# Entries that say nothing about the adapted function beyond what the tensors say, or that `from_peft` reads. Any other
# one that is set (DoRA, replicated layers, what later releases bring) changes the function in a way not known here.
_READ = KEYS | frozenset(
    "auto_mapping base_model_name_or_path ensure_weight_tying eva_config exclude_modules layers_pattern "
    "layers_to_transform megatron_core peft_version qalora_group_size revision runtime_config use_rslora "
    "weights_sha256".split()
)
# Initialisations that leave the base's weights as they are; PiSSA, OLoRA and others move a part into the factors.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def fits(method: Method, model: nn.Module) -> bool:
    """Whether the method is one that peft has: LoRA alone with a pair for every target and nothing but these, in one
    stack of blocks."""
    if not isinstance(method, LoRA) or method.heads != "joint" or method.stacks is not None:
        return False
    found = find_hosts(model)
    if len(found) != 1:
        return False
    _, host, family = found[0]
    # A target may mean two projections, that of attention to a memory besides; the format has no word for the second.
    return all(method.roles(block) == method.targets for _, block in family.describe(host).blocks)


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
    heads = sorted({_saved_module(name, prefix, spec) for name in tensors if ".lora." not in name})
    for name, tensor in tensors.items():
        if ".lora." not in name:
            out[_ROOT + name] = tensor
    # A rank of its own goes into the patterns, so that r says what most layers have.
    counts = Counter(ranks.values())
    rank = max(counts, key=counts.__getitem__)
    patterns = {path: own for path, own in ranks.items() if own != rank}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": method.scale * rank,
        "lora_dropout": method.dropout,
        "bias": "none",
        "init_lora_weights": True,
        "target_modules": sorted(ranks),
        "modules_to_save": heads or None,
        "rank_pattern": patterns,
        "alpha_pattern": {path: method.scale * own for path, own in patterns.items()},
    }
    return config, out


def _saved_module(name: str, prefix: str, spec: HostSpec) -> str:
    """The module that peft is to copy for a tensor: a head as a whole, of another module the one that holds it."""
    heads = (f"{prefix}{head}" for head in spec.heads)
    return next((head for head in heads if name.startswith(f"{head}.")), name.rsplit(".", 1)[0])


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
        FastPEFTError: it is not plain LoRA of one rank and scale on projections of every block, with or without the
            head; says which entry, layer or tensor is in the way.
    """
    _check_config(config)
    prefix, spec = _host(model)
    pattern = re.compile(re.escape(_ROOT + prefix) + r"(.+)\.lora_(A|B)\.weight")
    placed = {f"{block}.{p.path}": (block, b) for block, b in spec.blocks for p in b.roles.values()}
    heads = tuple(f"{prefix}{head}." for head in spec.heads)
    out: dict[str, Tensor] = {}
    layers: dict[str, tuple[str, str]] = {}
    for name, tensor in sorted(tensors.items()):
        match = pattern.fullmatch(name)
        if match is None:
            own = name.removeprefix(_ROOT).replace(".modules_to_save.default", "")
            if not own.startswith(heads) or ".lora_" in own:
                raise _refusal(f"{name} is neither LoRA on a projection in the blocks nor the head")
            out[own] = tensor
            continue
        layer, factor = match.groups()
        if layer not in placed:
            raise _refusal(f"{name} is not on a projection that fastpeft runs")
        block, block_spec = placed[layer]
        # A pair for the whole layer: the role that spans it.
        roles = {r: p for r, p in block_spec.roles.items() if f"{block}.{p.path}" == layer}
        role = max(roles, key=lambda r: roles[r].out_features)
        out[f"{prefix}{block}.lora.{role}.{factor}"] = tensor
        layers[layer] = (block, role)
    if not layers:
        raise _refusal("it holds no LoRA tensors")
    targets = tuple(sorted({role for _, role in layers.values()}))
    for block, block_spec in spec.blocks:
        for role in targets:
            if (block, role) not in layers.values():
                place = f"{block}.{block_spec.roles[role].path}" if role in block_spec.roles else f"{block}, {role},"
                raise _refusal(f"{place} has no LoRA while other blocks have")
    rank, scale = _one_rank_and_scale(config, tensors, prefix, sorted(layers))
    # Its targets are all that it has, attention to a memory included.
    cross = not any(block.cross for _, block in spec.blocks)
    method = LoRA(rank, scale * rank, targets, config.get("lora_dropout", 0.0), cross)
    return method, any(".lora." not in name for name in out), out


def _refusal(reason: str) -> FastPEFTError:
    return FastPEFTError(
        f"the peft adapter cannot be loaded: {reason}. Load it with peft.PeftModel.from_pretrained and call "
        "fastpeft.patch on that model"
    )


def _check_config(config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise _refusal(f"its type is {config.get('peft_type')!r}, and only LORA is known")
    if config.get("bias", "none") != "none":
        raise _refusal(f"it trains biases (bias={config['bias']!r})")
    init = config.get("init_lora_weights", True)
    if init not in _INITS:
        raise _refusal(f"init_lora_weights={init!r} changed the base's weights")
    for name in sorted(set(config) - _READ):
        if config[name]:
            raise _refusal(f"{name}={config[name]!r} is not plain LoRA")


def _one_rank_and_scale(
    config: dict[str, Any], tensors: dict[str, Tensor], prefix: str, layers: list[str]
) -> tuple[int, float]:
    """The rank and alpha / rank that all layers share."""
    found: dict[tuple[int, float], str] = {}
    for layer in layers:
        try:
            rank = tensors[f"{_ROOT}{prefix}{layer}.lora_A.weight"].shape[0]
            tensors[f"{_ROOT}{prefix}{layer}.lora_B.weight"]
        except KeyError as error:
            raise _refusal(f"it lacks {error.args[0]}") from None
        alpha = _matching(config.get("alpha_pattern"), prefix + layer, config.get("lora_alpha", 8))
        if not isinstance(alpha, (int, float)) or not alpha > 0:
            raise _refusal(f"lora_alpha of {layer} is {alpha!r}, and a positive number was expected")
        found.setdefault((rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)), layer)
    if len(found) > 1:
        (one, first), (other, second), *_ = found.items()
        raise _refusal(
            f"{first} has rank {one[0]} and scale {one[1]:g}, {second} has rank {other[0]} and scale {other[1]:g}; "
            "fastpeft.LoRA has one of each"
        )
    return next(iter(found))


def _matching(pattern: dict[str, Any] | None, name: str, default: Any) -> Any:
    """The value whose key, a regular expression for the end of a module's path, fits first; peft looks it up so."""
    return next((v for key, v in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)
