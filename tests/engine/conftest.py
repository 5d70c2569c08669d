"""What the tests of backends share."""

from __future__ import annotations

import importlib

import pytest

from fastpeft.ops import choose


@pytest.fixture
def calls(monkeypatch):
    """Operators whose Triton kernels were called, forward or backward."""
    seen = {"forward": set(), "backward": set()}

    def watch(module, operator, name):
        inner = getattr(module, name)

        def spy(*args, **kwargs):
            seen[name.split("_")[0]].add(operator)
            return inner(*args, **kwargs)

        monkeypatch.setattr(module, name, spy)

    for operator in choose.OPERATORS:
        module = importlib.import_module(f"fastpeft.kernels.{operator}")
        for name in ("forward", "backward", "backward_input"):
            if hasattr(module, name):
                watch(module, operator, name)
    return seen
