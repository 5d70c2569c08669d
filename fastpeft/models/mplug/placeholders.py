"""Torch files read without looking up a single class: what is unknown becomes a placeholder, and nothing runs.

Published checkpoints carry configurations of classes that are not installed (YAML mappings, command lines), and CLIP's
own files are TorchScript archives. Both are zip archives of one pickle and the tensors' bytes. Here the pickle can make
tensors and containers; every other name in it, class or function, is a placeholder that takes what it is given and
does nothing.
"""

from __future__ import annotations

import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastpeft.errors import FastPEFTError

# What a damaged archive or pickle can lead to.
_DAMAGE = (
    *(OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, ImportError, OverflowError),
    *(RuntimeError, MemoryError, struct.error, zipfile.BadZipFile, pickle.UnpicklingError),
)
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Placeholder:
    """In the place of an object of any class.

    Attributes:
        held: the object's attributes and items by name.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        """Without __init__, which a pickle need not call."""
        made = super().__new__(cls)
        made.held = {}
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Placeholder:
        """As what a function gave that was not looked up, and that is a function itself."""
        return Placeholder()

    def __setstate__(self, state: Any) -> None:
        # Slots come beside the attributes, as the second of two.
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.held.update(part)

    def __setitem__(self, name: Any, value: Any) -> None:
        self.held[name] = value

    def append(self, item: Any) -> None:
        """An item of a list is not kept."""

    def extend(self, items: Any) -> None:
        """Items of a list are not kept."""

    def add(self, item: Any) -> None:
        """An item of a set is not kept."""


class _Dict(dict):
    """In the place of an OrderedDict, whose attributes (a state dict's version numbers) are not wanted."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Maker:
    """A function that a pickle may call and, unlike a function, not set attributes of."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[..., Any]):
        self.make = make

    def __call__(self, *args: Any) -> Any:
        return self.make(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it sets attributes of a function")


class _Storage(NamedTuple):
    """Bytes of the archive; dtype is None where they are untyped, or of a type that is not known."""

    key: str
    dtype: torch.dtype | None


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive, as CLIP's published files are."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_archive(path: Path) -> tuple[Any, tuple[str, ...]]:
    """What a zip file of `torch.save` or TorchScript holds.

    Args:
        path: the file; tensors are views of it in memory, private to this process.

    Returns:
        The content, with placeholders, and the names that were not looked up.

    Raises:
        FastPEFTError: the file is not such an archive, or damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
            if len(pickles) != 1:
                raise FastPEFTError(f"{path}: expected a torch file with one data.pkl in it, got {len(pickles)}")
            records = _Records(path, archive, pickles[0].removesuffix("data.pkl"))
            with archive.open(pickles[0]) as file:
                unpickler = _Unpickler(file, records)
                return unpickler.load(), tuple(sorted(unpickler.unknown))
    except FastPEFTError:
        raise
    except _DAMAGE as error:
        text = str(error).splitlines() or [""]
        raise FastPEFTError(f"{path}: cannot be read as a torch file: {type(error).__name__}: {text[0]}") from error


class _Records:
    """The tensors' bytes in an archive."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, root: str):
        self.archive = archive
        self.root = root
        self.file = np.memmap(path, dtype=np.uint8, mode="c")
        self.read: dict[str, np.ndarray] = {}
        if f"{root}byteorder" in archive.namelist():
            order = archive.read(f"{root}byteorder").decode()
            if order != sys.byteorder:
                raise FastPEFTError(f"{path}: was written with {order}-endian numbers, this machine is {sys.byteorder}")

    def bytes(self, key: str) -> np.ndarray:
        """One storage, uint8; tensors that share it share memory."""
        if key not in self.read:
            entry = self.archive.getinfo(f"{self.root}data/{key}")
            if entry.compress_type == zipfile.ZIP_STORED:
                self.read[key] = self._view(entry)
            else:
                self.read[key] = np.frombuffer(bytearray(self.archive.read(entry)), np.uint8)
        return self.read[key]

    def _view(self, entry: zipfile.ZipInfo) -> np.ndarray:
        # A record's own header ends in a name and a field whose lengths need not be those of the directory's entry.
        header = self.file[entry.header_offset : entry.header_offset + 30].tobytes()
        name, extra = struct.unpack("<HH", header[26:30])
        start = entry.header_offset + 30 + name + extra
        return self.file[start : start + entry.file_size]


class _Unpickler(pickle.Unpickler):
    """Makes tensors, containers and placeholders, and looks up nothing."""

    def __init__(self, file: Any, records: _Records):
        super().__init__(file, encoding="utf-8")
        self.records = records
        self.unknown: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _Dict
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return _Maker(self._tensor)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _Maker(_parameter)
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) != ("torch.storage", "UntypedStorage"):
            self.unknown.add(f"{module}.{name}")
        return Placeholder

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) < 3 or pid[0] != "storage":
            raise pickle.UnpicklingError("it refers to something that is not a tensor's bytes")
        return _Storage(str(pid[2]), pid[1] if isinstance(pid[1], torch.dtype) else None)

    def _tensor(self, storage: _Storage, offset: int, size: tuple, stride: tuple, *rest: Any) -> Tensor | Placeholder:
        dtypes = [part for part in rest if isinstance(part, torch.dtype)]
        dtype = dtypes[0] if dtypes else storage.dtype
        if dtype is None:
            return Placeholder()
        content = self.records.bytes(storage.key)
        itemsize = torch.empty((), dtype=dtype).element_size()
        if content.ctypes.data % itemsize:
            content = content.copy()
        flat = torch.from_numpy(content[: content.size // itemsize * itemsize]).view(dtype)
        # Checks the bounds: a tensor that reaches over the storage's end is an error.
        return flat.as_strided(size, stride, offset)


def _parameter(data: Any, *rest: Any) -> Any:
    return data
