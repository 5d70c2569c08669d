"""The CUDA kernels (csrc/cuda) as operators of torch, `torch.ops.fastpeft_cuda`.

The library is optional, and built only where it is asked for:

    FASTPEFT_CUDA=1 pip install --no-build-isolation -e .

setup.py says what that needs. Nothing is opened on import, only when first asked for; `status` says why it is not
there. `fastpeft.ops.cuda_attention` and `fastpeft.ops.cuda_adapter` are how the rest of fastpeft calls it.
"""

from __future__ import annotations

import ctypes
import functools
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("libfastpeft_cuda.so")
# As setup.py's TORCH_TARGET.
OLDEST_TORCH = (2, 11)
# Of the interface in csrc/cuda/library.cpp: the operators' schemas, and what the bits of `needs` mean.
INTERFACE = 1
ALIGNMENT = 16  # bytes, at which every row of a tensor starts
_BUILD = "FASTPEFT_CUDA=1 pip install --no-build-isolation ."


@functools.cache
def _open() -> tuple[Any, str, str]:
    """The operators or None, the chips they were compiled for, and a line about the library.

    A library that is there but unusable is one warning.
    """
    if not LIBRARY.exists():
        return None, "", f"not built; to build it: {_BUILD} (with torch, ninja and nvcc)"
    try:
        if torch_version() < OLDEST_TORCH:
            raise OSError(f"it needs torch {'.'.join(map(str, OLDEST_TORCH))} or later, this is {torch.__version__}")
        torch.ops.load_library(str(LIBRARY))
        library = ctypes.CDLL(str(LIBRARY))
        library.fastpeft_cuda_interface.restype = ctypes.c_int32
        library.fastpeft_cuda_architectures.restype = ctypes.c_char_p
        found, chips = library.fastpeft_cuda_interface(), library.fastpeft_cuda_architectures().decode()
    except (OSError, AttributeError) as error:
        reason = f"cannot be loaded: {error}"
    else:
        if found == INTERFACE:
            return torch.ops.fastpeft_cuda, chips, f"loaded from {LIBRARY}, for compute capabilities {chips}"
        reason = f"{LIBRARY} was built from other sources (interface {found}, expected {INTERFACE})"
    reason += f"; rebuild it with {_BUILD}"
    warnings.warn(f"fastpeft goes on without its CUDA kernels, whose library {reason}", RuntimeWarning, stacklevel=3)
    return None, "", reason


def torch_version() -> tuple[int, ...]:
    """(major, minor) of torch."""
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def library() -> Any:
    """The operators, `torch.ops.fastpeft_cuda`, or None where the library is not built or not usable."""
    return _open()[0]


def status() -> str:
    """One line: where the library was loaded from and for which chips, or why it was not."""
    return _open()[2]


def covers(chips: str, capability: tuple[int, int]) -> bool:
    """Whether a chip can run what was compiled for others.

    Machine code runs on later chips of the same major version, except that of a chip's own variant ("9.0a"). PTX, which
    the last one without a letter has, is compiled for any later chip by the driver.

    Args:
        chips: compute capabilities, "8.0 9.0a 10.0".
        capability: of the chip, (9, 0).
    """
    portable = (0, 0)
    for major, minor, variant in re.findall(r"(\d+)\.(\d)([af]?)", chips):
        chip = int(major), int(minor)
        if chip == capability or (variant != "a" and chip[0] == capability[0] and chip <= capability):
            return True
        portable = portable if variant else chip
    return (0, 0) < portable <= capability


def unavailable(capability: int) -> str | None:
    """Why the kernels cannot run on a GPU whatever the arguments, or None.

    Args:
        capability: of the GPU, 90 for sm_90.
    """
    operators, chips, line = _open()
    if operators is None:
        return f"its library is {line}" if line.startswith("not built") else f"its library {line}"
    if not covers(chips, divmod(capability, 10)):
        return f"its library has compute capabilities {chips}, the GPU has {capability / 10:.1f}"
    return None


def device_reasons(tensor: Tensor) -> list[str]:
    """Why the kernels cannot run where a tensor is."""
    if tensor.device.type != "cuda":
        return [f"needs an NVIDIA GPU, the tensors are on {tensor.device.type}"]
    major, minor = torch.cuda.get_device_capability(tensor.device)
    why = unavailable(10 * major + minor)
    return [] if why is None else [why]


def aligned(tensor: Tensor) -> bool:
    """Whether a tensor's last dimension is contiguous and its rows start at multiples of 16 bytes."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        return False
    elements = ALIGNMENT // tensor.element_size()
    strides = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    return tensor.data_ptr() % ALIGNMENT == 0 and all(size == 1 or stride % elements == 0 for size, stride in strides)


def realigned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it with aligned rows."""
    return tensor if aligned(tensor) else tensor.clone(memory_format=torch.contiguous_format)
