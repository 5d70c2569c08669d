"""Operators are tested on memory that holds NaN until it is written."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _poisoned(poisoned_memory):
    pass
