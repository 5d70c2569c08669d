"""The NumPy archives in which Google published its vision transformers."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from fastpeft.errors import FastPEFTError

_PREFIXES = ("", "opt/target/")
_ATTENTION = "MultiHeadDotProductAttention_1"
# Inside an encoder block: archive's module -> timm's.
_NORMS = {"LayerNorm_0": "norm1", "LayerNorm_2": "norm2"}
_DENSE = {"MlpBlock_3/Dense_0": "mlp.fc1", "MlpBlock_3/Dense_1": "mlp.fc2"}


def read_npz(path: Path, dropped: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Read an archive into timm's names.

    Args:
        path: The archive.
        dropped: Takes (name, reason) of entries that are not part of the backbone.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            entries = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise FastPEFTError(f"{path}: cannot be read as a NumPy archive: {error}") from error
    prefix = next((prefix for prefix in _PREFIXES if f"{prefix}embedding/kernel" in entries), None)
    if prefix is None:
        raise FastPEFTError(f"{path}: not a vision transformer's archive: it has no embedding/kernel")
    reader = _Reader({name.removeprefix(prefix): array for name, array in entries.items()}, path)
    state = reader.read()
    dropped += [(name, "not part of the backbone") for name in reader.unused()]
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in state.items()}


class _Reader:
    """Takes entries out of an archive and remembers which are left."""

    def __init__(self, entries: Mapping[str, np.ndarray], path: Path) -> None:
        self._entries = dict(entries)
        self._path = path

    def unused(self) -> list[str]:
        return sorted(self._entries)

    def read(self) -> dict[str, np.ndarray]:
        state = {
            "cls_token": self._take("cls"),
            # height, width, in, out -> out, in, height, width
            "patch_embed.proj.weight": self._take("embedding/kernel").transpose(3, 2, 0, 1),
            "patch_embed.proj.bias": self._take("embedding/bias"),
            "pos_embed": self._take("Transformer/posembed_input/pos_embedding"),
        }
        state |= self._norm("Transformer/encoder_norm", "norm")
        block = 0
        while f"Transformer/encoderblock_{block}/LayerNorm_0/scale" in self._entries:
            state |= self._block(f"Transformer/encoderblock_{block}", f"blocks.{block}")
            block += 1
        return state

    def _block(self, source: str, target: str) -> dict[str, np.ndarray]:
        state: dict[str, np.ndarray] = {}
        for theirs, ours in _NORMS.items():
            state |= self._norm(f"{source}/{theirs}", f"{target}.{ours}")
        for theirs, ours in _DENSE.items():
            state[f"{target}.{ours}.weight"] = self._take(f"{source}/{theirs}/kernel").T
            state[f"{target}.{ours}.bias"] = self._take(f"{source}/{theirs}/bias")
        # in, heads, head width -> heads * head width, in; and the three below one another
        parts = [f"{source}/{_ATTENTION}/{part}" for part in ("query", "key", "value")]
        kernels = [self._take(f"{part}/kernel") for part in parts]
        state[f"{target}.attn.qkv.weight"] = np.concatenate([k.reshape(k.shape[0], -1).T for k in kernels])
        state[f"{target}.attn.qkv.bias"] = np.concatenate([self._take(f"{part}/bias").reshape(-1) for part in parts])
        # heads, head width, out -> out, heads * head width
        kernel = self._take(f"{source}/{_ATTENTION}/out/kernel")
        state[f"{target}.attn.proj.weight"] = kernel.reshape(-1, kernel.shape[-1]).T
        state[f"{target}.attn.proj.bias"] = self._take(f"{source}/{_ATTENTION}/out/bias")
        return state

    def _norm(self, source: str, target: str) -> dict[str, np.ndarray]:
        return {f"{target}.weight": self._take(f"{source}/scale"), f"{target}.bias": self._take(f"{source}/bias")}

    def _take(self, name: str) -> np.ndarray:
        if name not in self._entries:
            raise FastPEFTError(f"{self._path}: not a whole vision transformer: it has no {name}")
        return self._entries.pop(name)
