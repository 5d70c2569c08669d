"""Every Triton kernel compiles for the chips it is meant for, with the launch choices it would get there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bench.kernels import CHIPS, operators


@pytest.mark.parametrize("operator", operators())
def test_no_spills_and_within_the_chips_limits(operator, capsys):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.kernels", operator]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    with capsys.disabled():
        print(f"\n{done.stdout}")
    assert done.returncode == 0, done.stderr
    assert all(f"sm_{chip}" in done.stdout for chip in CHIPS)
