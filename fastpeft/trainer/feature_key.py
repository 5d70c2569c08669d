"""What features depend on, so that kept ones are taken for another run's only where they are the same to the last bit.

Everything is named by its content: weights and images by their bytes, the library by its own files. A key is therefore
the same on another path or after another download, and another one as soon as anything has changed.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastpeft.data.errors import DataError
from fastpeft.data.sources import ArraySource, FileSource
from fastpeft.trainer.launch import Ranks

_PACKAGES = ("torch", "timm", "numpy", "pillow")
# Of `config.model`: what is not in the weights. The weights' bytes say more than where they came from.
_NOT_OF_THE_MODEL = ("weights", "start", "num_classes")


def feature_key(prefix, config: Any, images: Dataset, ranks: Ranks, dtype: torch.dtype) -> dict[str, Any] | None:
    """What the features of a split depend on.

    Args:
        prefix: From `fastpeft.frozen_prefix`, its weights in the format in which they compute.
        config: The run's.
        images: The split, an `ImageDataset`.
        ranks: Where it is encoded.
        dtype: The working format.

    Returns:
        Plain values by name; None if the images' source is not one whose bytes can be named.

    Raises:
        DataError: An image file cannot be read.
    """
    data = images_digest(images)
    if data is None:
        return None
    model = config.model.model_dump(mode="json")
    return {
        "backbone": prefix_digest(prefix),
        "prefix": prefix.description,
        "model": {name: value for name, value in model.items() if name not in _NOT_OF_THE_MODEL},
        "images": len(images),
        "data": data,
        "preprocessing": images.preprocessing,
        **circumstances(ranks, dtype),
    }


def circumstances(ranks: Ranks, dtype: torch.dtype) -> dict[str, Any]:
    """What features depend on besides weights and images: format, machine and code."""
    return {
        "precision": str(dtype).removeprefix("torch."),
        "device": _device(ranks.device),
        "code": code_digest(),
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith("FASTPEFT_")},
        "versions": {package: _version(package) for package in _PACKAGES},
    }


def prefix_digest(prefix) -> str:
    """SHA-256 of the tensors that a frozen prefix may read: all but the heads and what comes behind it."""
    host: nn.Module = prefix.decoder.model
    spec = host.fastpeft_host.spec
    behind = [f"{name}." for name in spec.heads] + [f"{path}." for path, _ in spec.blocks[prefix.start :]]
    if prefix.start <= len(spec.blocks):
        behind += [f"{name}." for name in spec.final]
    named = [*host.named_parameters(), *host.named_buffers()]
    return tensors_digest((name, tensor) for name, tensor in named if not name.startswith(tuple(behind)))


def tensors_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of tensors with their names, formats and shapes, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda entry: entry[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def files_digest(paths: Iterable[Path]) -> str:
    """SHA-256 of files in their order, of their bytes.

    Raises:
        DataError: One cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        digest.update(_file_digest(Path(path)))
    return digest.hexdigest()


def images_digest(images: Dataset) -> str | None:
    """SHA-256 of a split's images in their order, of the files' bytes; None for a source of another kind."""
    source = getattr(images, "source", None)
    digest = hashlib.sha256()
    if isinstance(source, FileSource):
        return files_digest(source.paths)
    if isinstance(source, ArraySource):
        digest.update(f"{source.images.dtype} {source.images.shape}\n".encode())
        digest.update(np.ascontiguousarray(source.images).data)
    else:
        return None
    return digest.hexdigest()


@functools.cache
def code_digest() -> str:
    """SHA-256 of the library's own files, native libraries and kernels included."""
    package = Path(__file__).resolve().parents[1]
    folders = [package] + [folder for folder in (package.parent / "kernels",) if folder.is_dir()]
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".so", ".pyd", ".dylib")):
            digest.update(f"{path.relative_to(folder.parent)}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _file_digest(path: Path) -> bytes:
    try:
        status = path.stat()
        return _content_digest(path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


# A file is read once a process, as long as nothing says that it has changed. Digests of 32 bytes: no test set of the
# benchmarks has more images.
@functools.lru_cache(maxsize=400_000)
def _content_digest(path: Path, *status: int) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


def _device(device: torch.device) -> str:
    """What rounds alike: a kind of GPU, or the instruction set that torch uses on this CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
