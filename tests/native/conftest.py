"""Every instruction set that this machine has; skipped where the native library is not built."""

from __future__ import annotations

import pytest

from fastpeft import _native
from fastpeft.native.vector import library

HERE = [name for name, needs in _native.LEVELS.items() if needs <= _native.cpu_features()]


@pytest.fixture(autouse=True)
def built():
    """Nothing here can be tested without the library."""
    if _native.library() is None:
        pytest.skip(f"the native library is {_native.status()}")


@pytest.fixture(params=HERE)
def level(request, monkeypatch):
    """Run the functions of one instruction set after another."""
    if request.param == "amx" and not _native.request_amx():
        pytest.skip("the operating system does not grant the matrix unit")
    monkeypatch.setattr(library, "level", lambda: request.param)
    return request.param
