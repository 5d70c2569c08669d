"""The native CPU library (csrc/cpu), and what the CPU can run.

The library is optional: everything works without it, and `status` says why it is not there. Nothing is opened on
import, only when first asked for.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import warnings
from collections.abc import Callable
from pathlib import Path

from fastpeft import _sources

LIBRARY = Path(__file__).with_name("libfastpeft_cpu.so")
# In the order of the bits in csrc/cpu/features.cpp.
FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "amx_tile", "amx_bf16")

_INSTALL = "pip install --no-build-isolation ."


@functools.cache
def _open() -> tuple[ctypes.CDLL | None, str]:
    """The library or None, and a line about it. A library that is there but unusable is one warning."""
    if not LIBRARY.exists():
        return None, f"not built; to build it: {_INSTALL} (with torch, ninja and a C++ compiler)"
    try:
        library = ctypes.CDLL(str(LIBRARY))
        built_from = _built_from(library)
        if built_from is not None and built_from == _sources.expected():
            library.fastpeft_cpu_features.restype = ctypes.c_uint64
            library.fastpeft_cpu_request_amx.restype = ctypes.c_int32
            return library, f"loaded from {LIBRARY}"
        reason = f"built from other sources than those of this fastpeft ({LIBRARY})"
    except (OSError, ValueError) as error:
        reason = f"it cannot be loaded: {error}"
    reason = f"unusable: {reason}; rebuild it: {_rebuild()}"
    warnings.warn(f"fastpeft goes on without its native CPU library, which is {reason}", RuntimeWarning, stacklevel=3)
    return None, reason


def _rebuild() -> str:
    """The command that builds the library anew."""
    return "python setup.py build_ext --inplace" if _sources.FOLDER.is_dir() else _INSTALL


def _built_from(library: ctypes.CDLL) -> int | None:
    """The number of the sources that a library was built from, as of `fastpeft._sources`; None if it does not say."""
    try:
        sources = library.fastpeft_cpu_sources
    except AttributeError:
        return None
    sources.restype = ctypes.c_uint64
    return sources()


def library() -> ctypes.CDLL | None:
    """The native CPU library, or None where it is not built or not usable."""
    return _open()[0]


def status() -> str:
    """One line: where the native library was loaded from, and what it lacks; or why it was not."""
    line = _open()[1]
    return f"{line}, built without {', '.join(_lacking())}" if _lacking() else line


@functools.cache
def cpu_features() -> frozenset[str]:
    """Names from `FEATURES` that the CPU and the operating system together can run.

    Without the native library the operating system's own list is read, which exists on Linux only; elsewhere the
    answer is then empty, which selects the slowest and safest code.
    """
    if (native := library()) is not None:
        bits = native.fastpeft_cpu_features()
        return frozenset(name for position, name in enumerate(FEATURES) if bits >> position & 1)
    return _listed_features(Path("/proc/cpuinfo"))


# Instruction sets that the native operators are written for, each with what it needs of `FEATURES`.
_AVX512 = frozenset({"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"})
LEVELS = {
    "none": frozenset(),
    "avx2": frozenset({"avx2", "fma"}),
    "avx512": _AVX512,
    "amx": _AVX512 | {"avx512_bf16", "amx_tile", "amx_bf16"},
}
LEVEL_VARIABLE = "FASTPEFT_CPU_LEVEL"
# Of each level one function that only a compiler that knew its instructions has built. Beside those of the matrix unit
# run those of avx512.
_WITNESSES = {
    "avx2": ("fastpeft_layer_norm_forward_avx2",),
    "avx512": ("fastpeft_layer_norm_forward_avx512",),
    "amx": ("fastpeft_gemm_amx", "fastpeft_layer_norm_forward_avx512"),
}


def _lacking() -> list[str]:
    """The levels that the CPU has and the native library, where it is there, was not built for."""
    native = library()
    if native is None:
        return []
    here = [name for name, needs in LEVELS.items() if needs <= cpu_features()]
    return [name for name in here if not all(hasattr(native, witness) for witness in _WITNESSES.get(name, ()))]


@functools.cache
def cpu_level() -> str:
    """The highest of `LEVELS` that this process may use; the environment variable FASTPEFT_CPU_LEVEL can lower it.

    A level that the library was not built for is none; without a wish that is one warning.

    Raises:
        ValueError: the variable names no level, or one that the CPU or the library does not have.
    """
    lacking = _lacking()
    here = [name for name, needs in LEVELS.items() if needs <= cpu_features() and name not in lacking]
    possible = [name for name in here if name != "amx" or request_amx()]
    wish = os.environ.get(LEVEL_VARIABLE)
    if wish:
        if wish not in possible:
            raise ValueError(f"{LEVEL_VARIABLE}={wish}: this CPU runs {', '.join(possible)} with this library")
        return wish
    if lacking:
        warnings.warn(
            f"fastpeft's native CPU library was built without {', '.join(lacking)}, which this CPU has; it goes on "
            f"with {possible[-1]}. A newer compiler (CXX) would build them: {_rebuild()}",
            RuntimeWarning,
            stacklevel=2,
        )
    return possible[-1]


def function(name: str, *arguments: type) -> Callable[..., int]:
    """A function of the native library that takes these ctypes and returns an int32, 0 for success.

    Raises:
        RuntimeError: the library is not there; ask `library()` first.
    """
    native = library()
    if native is None:
        raise RuntimeError(f"the native library is {status()}")
    found = getattr(native, name)
    found.argtypes, found.restype = arguments, ctypes.c_int32
    return found


def request_amx() -> bool:
    """Ask the operating system for the AMX tile registers; True if this process may now use them."""
    native = library()
    return native is not None and "amx_tile" in cpu_features() and bool(native.fastpeft_cpu_request_amx())


def _listed_features(listing: Path) -> frozenset[str]:
    """Names from `FEATURES` in Linux's own list of the CPU's features."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return frozenset()
    try:
        lines = listing.read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return frozenset(flags) & frozenset(FEATURES)
