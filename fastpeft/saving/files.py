"""The two files of a saved adapter: each is written whole or not at all, and a checksum ties them together."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from fastpeft.errors import FastPEFTError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def write(folder: str | os.PathLike, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write both files; the config holds a checksum of the weights.

    Args:
        folder: made if it is not there.
        config: JSON-able.
        tensors: by name; moved to the CPU.

    Raises:
        FastPEFTError: the config cannot be written as JSON.
    """
    from safetensors.torch import save as serialise

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    blob = serialise({name: t.detach().cpu().contiguous() for name, t in sorted(tensors.items())}, {"format": "pt"})
    config = {**config, "weights_sha256": hashlib.sha256(blob).hexdigest()}
    try:
        text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise FastPEFTError(f"metadata of a saved adapter must be JSON: {error}") from None
    replace(folder / WEIGHTS, blob)
    replace(folder / CONFIG, text.encode())


def replace(path: Path, data: bytes) -> None:
    """Write a file completely or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The config of a saved adapter, with the metadata that `save` was given.

    Raises:
        FastPEFTError: there is none, or it is not a JSON object.
    """
    path = Path(folder) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FastPEFTError(f"{path} is not there; expected a folder written by fastpeft.save or peft") from None
    except (OSError, ValueError) as error:
        raise FastPEFTError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise FastPEFTError(f"{path} holds a JSON {type(config).__name__}, expected an object")
    return config


def read_tensors(folder: str | os.PathLike, checksum: str | None) -> dict[str, Tensor]:
    """The tensors of a saved adapter.

    Raises:
        FastPEFTError: the file is missing, damaged, or not the one that the config was written with.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as deserialise

    path = Path(folder) / WEIGHTS
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise FastPEFTError(f"{path} cannot be read: {error.strerror}") from None
    if checksum is not None and hashlib.sha256(blob).hexdigest() != checksum:
        raise FastPEFTError(f"{path} is damaged or belongs to another save than {CONFIG}; save the adapter again")
    try:
        return deserialise(blob)
    except SafetensorError as error:
        raise FastPEFTError(f"{path} is not a safetensors file: {error}") from None
