"""A checkpoint's tensors and what else of it counts, from the forms in which mPLUG, CLIP and BERT are published."""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpeft.errors import FastPEFTError
from fastpeft.models.checkpoints import read_torch
from fastpeft.models.mplug.placeholders import Placeholder, is_torchscript, read_archive

# Beside the weights in a file that `write_state` wrote.
_CONFIG = "mplug_config"
_TORCH_SUFFIXES = (".pth", ".pt", ".bin")
# Modules in modules, in a TorchScript archive; a file made to go on for ever ends here.
_DEEPEST = 40


@dataclass(frozen=True)
class Checkpoint:
    """What was read.

    Attributes:
        source: the file's name, for errors.
        state: tensors by the file's names.
        config: sizes of the model, if the file says them.
        placeholders: classes and functions that the file names and that were not looked up.
    """

    source: str
    state: dict[str, Tensor]
    config: dict[str, Any] | None = None
    placeholders: tuple[str, ...] = ()


def read_state(path: str | os.PathLike) -> Checkpoint:
    """Read a `.safetensors` file or a torch file.

    Weights of a torch file lie under `model`, `module` (DeepSpeed) or `state_dict`, or the file is the state dict, or a
    TorchScript archive. No code of a file is ever run.

    Raises:
        FastPEFTError: the file is missing, damaged or without tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FastPEFTError(f"{path}: no such file of weights")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content, placeholders = _read_torch(path)
    state, config = _unwrap(content)
    if not state:
        raise FastPEFTError(f"{path}: expected a dict of tensors, alone or under model, module or state_dict")
    return Checkpoint(str(path), state, config, placeholders)


def write_state(state: dict[str, Tensor], config: dict[str, Any], path: str | os.PathLike) -> None:
    """Write tensors and sizes, the whole file or nothing.

    Args:
        state: by name.
        config: JSON-able.
        path: `.safetensors`, or `.pth`, `.pt` or `.bin` with the tensors under `model`.

    Raises:
        FastPEFTError: another suffix.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", *_TORCH_SUFFIXES):
        expected = ", ".join((".safetensors", *_TORCH_SUFFIXES))
        raise FastPEFTError(f"{path}: a checkpoint's suffix must be one of {expected}")
    state = {name: t.detach().cpu().contiguous() for name, t in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(state, unfinished, {"format": "pt", _CONFIG: json.dumps(config)})
        else:
            torch.save({"model": state, _CONFIG: config}, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _read_safetensors(path: Path) -> Checkpoint:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_CONFIG)
            state = {name: file.get_tensor(name) for name in file.keys()}
        config = None if text is None else json.loads(text)
    except (SafetensorError, OSError, ValueError) as error:
        raise FastPEFTError(f"{path}: cannot be read as a safetensors file: {error}") from error
    return Checkpoint(str(path), state, config if isinstance(config, dict) else None)


def _read_torch(path: Path) -> tuple[Any, tuple[str, ...]]:
    if not zipfile.is_zipfile(path):
        return read_torch(path), ()
    if is_torchscript(path):
        return read_archive(path)
    try:
        # Mapped: optimizer states, which may be twice the weights, are never read.
        return read_torch(path, mmap=True), ()
    except FastPEFTError:
        return read_archive(path)


def _unwrap(content: Any) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The state dict in what a training script saved, and the sizes beside it."""
    content = _held(content)
    config = _held(content.get(_CONFIG)) or None
    for key in ("model", "module", "state_dict"):
        inner = _tensors(content.get(key))
        if inner:
            return inner, config
    return _tensors(content), config


def _tensors(content: Any, deep: int = 0) -> dict[str, Tensor]:
    """Tensors by name; a module in a module, as TorchScript has them, adds its name and a dot."""
    if deep > _DEEPEST:
        return {}
    found = {}
    for name, value in _held(content).items():
        if isinstance(value, Tensor):
            found[str(name)] = value
        elif isinstance(value, Placeholder):
            found.update({f"{name}.{rest}": t for rest, t in _tensors(value, deep + 1).items()})
    return found


def _held(content: Any) -> dict:
    if isinstance(content, Placeholder):
        return content.held
    return content if isinstance(content, dict) else {}
