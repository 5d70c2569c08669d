"""The kernels of csrc/cuda, compiled once for the CPU."""

from __future__ import annotations

import fcntl
import os

import pytest

from fastpeft import _cuda
from tests.cuda.emulation import Emulator, build, compiler


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The kernels as a library for this CPU, which all processes of the test run share."""
    if compiler() is None:
        pytest.skip("needs a C++ compiler, and found none of g++, c++ and clang++")
    folder = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        folder = folder.parent
    folder = folder / "emulated"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = folder / "libemulated.so"
        return Emulator(library if library.exists() else build(folder))


@pytest.fixture
def emulator(compiled):
    """The emulated kernels; a test that makes them share banks of shared memory fails."""
    before = compiled.conflicts
    yield compiled
    assert compiled.conflicts == before, "rows of matrix loads share banks of shared memory"


@pytest.fixture
def operators(compiled, monkeypatch):
    """The emulated operators where fastpeft expects those of a GPU."""
    monkeypatch.setattr(_cuda, "library", lambda: compiled.operators)
    monkeypatch.setattr(_cuda, "device_reasons", lambda tensor: [])
    monkeypatch.setattr(_cuda, "unavailable", lambda capability: None)
    return compiled.operators
