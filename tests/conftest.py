"""What every test starts from: no downloads, fixed seeds, a timm that imports everywhere."""

from __future__ import annotations

import gc
import os

# Before anything imports huggingface_hub, which reads it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import random

import numpy as np
import pytest
import torch

from tests.thinned import mark_exhaustive

if not torch.cuda.is_available():
    # Before anything imports Triton's kernels, which are interpreted on a machine without a GPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from fastpeft._compat import import_timm

import_timm()


@pytest.hookimpl(tryfirst=True)  # before what `-m` does not ask for is left out
def pytest_collection_modifyitems(items):
    """Of very many slow cases of a test some are enough for the slow tests."""
    mark_exhaustive(items)


def pytest_collection_finish():
    """Leave what is imported, which stays, out of every collection of garbage: a tenth of the time of all tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory():
    """Fill memory that torch hands out uninitialised with NaN, so that reading what was never written shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
