"""Benchmarks are measurements: one process, no parallel workers, the machine noted in what they save."""

from __future__ import annotations

import pytest
import torch

from bench.timing import environment


@pytest.hookimpl(optionalhook=True)  # without pytest-benchmark there is nothing to add to
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """Add the versions and the device to the file that `--benchmark-json` writes."""
    machine_info["fastpeft"] = environment("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where benchmarks run: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
