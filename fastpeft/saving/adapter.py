"""`save` and `load` of what a method trained."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from fastpeft.errors import FastPEFTError, MethodError
from fastpeft.methods.base import from_dict
from fastpeft.parameters import hosts, owners
from fastpeft.patch import patch, record_of, unpatch
from fastpeft.saving import files, peft_format
from fastpeft.saving.fingerprint import fingerprint

_VERSION = 1


def save(model: nn.Module, folder: str | os.PathLike, **metadata: Any) -> None:
    """Write the method's tensors, the head and every other trained tensor of a model.

    LoRA alone is written so that Hugging Face peft reads the folder too.

    Args:
        model: a model patched with a method.
        folder: made if it is not there; an adapter in it is replaced.
        **metadata: JSON-able facts to keep in the config, such as base_model, image_size, mean, std, class_names.

    Raises:
        MethodError: the model carries no method, or its method was merged.
        FastPEFTError: metadata that cannot be written, or that uses a name of the format's own.
    """
    record = record_of(model)
    if record is None or record.method is None:
        raise MethodError("the model carries no method to save; patch it with one, such as fastpeft.VPT(length=50)")
    if record.merged is not None:
        raise MethodError("the method was merged into the model; save an adapter before fastpeft.merge")
    tensors = trained_tensors(model)
    twice = _aliases(model)
    base = [(name, t) for name, t in _all_tensors(model).items() if name not in tensors and name not in twice]
    config: dict[str, Any] = {
        "fastpeft": {
            "format_version": _VERSION,
            "method": record.method.to_dict(),
            "train_head": record.train_head,
            "base_fingerprint": fingerprint(base),
        }
    }
    taken = sorted(set(metadata) & ({"fastpeft", "weights_sha256"} | peft_format.KEYS))
    if taken:
        raise FastPEFTError(f"metadata must not use the names {', '.join(taken)}")
    if peft_format.fits(record.method, model):
        extra, tensors = peft_format.to_peft(model, record.method, tensors)
        config |= extra
    files.write(folder, {**metadata, **config}, tensors)


def load(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """Patch a plain model as a saved adapter says, and restore its tensors.

    Folders written by `save` and LoRA folders written by Hugging Face peft are read.

    Args:
        model: the base model, with a head like the adapter's: of as many classes and, if it is no linear layer, of the
            same modules.
        folder: the saved adapter.

    Returns:
        The same model, patched.

    Raises:
        FastPEFTError: the folder is not an adapter, is damaged, or was trained on another base; the model is then left
            as it was.
    """
    config = files.read_config(folder)
    tensors = files.read_tensors(folder, config.get("weights_sha256"))
    record = record_of(model)
    if record is not None and record.method is not None:
        raise MethodError("the model already carries a method; load an adapter into a plain model")
    own = config.get("fastpeft")
    if own is None:
        method, train_head, tensors = peft_format.from_peft(config, tensors, model)
        expected = None
    else:
        if not isinstance(own, dict) or own.get("format_version") != _VERSION:
            raise FastPEFTError(f"{folder}: format version {own!r} is not the version {_VERSION} that is known here")
        absent = sorted({"method", "train_head", "base_fingerprint"} - own.keys())
        if absent:
            raise FastPEFTError(f"{folder}: {files.CONFIG} lacks fastpeft.{', fastpeft.'.join(absent)}")
        method, train_head, expected = from_dict(own["method"]), bool(own["train_head"]), own["base_fingerprint"]
        if peft_format.fits(method, model):
            tensors = peft_format.to_own_names(tensors, method, model)
    _check_shapes(model, tensors, folder)
    if expected is not None:
        twice = _aliases(model)
        base = [(name, t) for name, t in _all_tensors(model).items() if name not in tensors and name not in twice]
        if fingerprint(base) != expected:
            raise FastPEFTError(
                f"{folder} was trained on another base than this {type(model).__name__}: weights, architecture or "
                "image size differ" + (f" (it names {config['base_model']!r})" if "base_model" in config else "")
            )
    settings = {path: host.fastpeft_host for path, host in hosts(model)}
    patch(model, method, train_head=train_head)
    try:
        _restore(model, tensors, folder)
    except BaseException:
        unpatch(model, discard=True)
        if settings:
            # What the engine could not run was left alone before, too.
            patch(model, strict=False, backend=record.backend)
            for path, host in hosts(model):
                before = settings[path]
                host.fastpeft_host.memory, host.fastpeft_host.backends = before.memory, before.backends
        raise
    return model


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What an adapter consists of: tensors of methods, the trained head, trained backbone weights; each tensor once.

    Buffers of the head too, such as a BatchNorm's statistics, which move in training without being trained.
    """
    owner = owners(model)
    taken = {name for name, p in model.named_parameters() if p.requires_grad}
    taken |= {name for name, _ in model.named_buffers() if owner.get(name) == "head"}
    aliases = _aliases(model)
    return {
        name: tensor
        for name, tensor in _all_tensors(model).items()
        if (name in taken or owner.get(name, "backbone") not in ("backbone", "head")) and name not in aliases
    }


def _all_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}


def _aliases(model: nn.Module) -> set[str]:
    """Names under which a parameter is registered again."""
    first = {name for name, _ in model.named_parameters()}
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - first


def _check_shapes(model: nn.Module, tensors: dict[str, Tensor], folder) -> None:
    present = _all_tensors(model)
    for name, tensor in tensors.items():
        if name in present and present[name].shape != tensor.shape:
            saved, here = tuple(tensor.shape), tuple(present[name].shape)
            hint = f"; create the model with num_classes={saved[0]}" if "head" in name else ""
            raise FastPEFTError(f"{folder}: {name} has shape {saved}, the model's has {here}{hint}")


@torch.no_grad()
def _restore(model: nn.Module, tensors: dict[str, Tensor], folder) -> None:
    present = _all_tensors(model)
    needed = set(trained_tensors(model))
    missing, unknown = sorted(needed - set(tensors)), sorted(set(tensors) - set(present))
    if missing or unknown:
        what = [f"lacks {', '.join(missing[:3])}"] * bool(missing) + [f"has unknown {', '.join(unknown[:3])}"] * bool(
            unknown
        )
        raise FastPEFTError(f"{folder} does not fit the method it names: it {' and '.join(what)}")
    _check_shapes(model, tensors, folder)
    for name, tensor in tensors.items():
        present[name].copy_(tensor)
