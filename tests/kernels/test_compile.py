"""Every Triton kernel compiles for the chips it is meant for, with the launch choices it would get there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bench.kernels import CHIPS, operators
from tests.thinned import thinned

# The chip that results are from; what another one needs is compiled with the slow tests.
USUAL = 90


def compiled(capsys, operator, *options, chips=CHIPS):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.kernels", operator, "--chips", *map(str, chips), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    with capsys.disabled():
        print(f"\n{done.stdout}")
    assert done.returncode == 0, done.stderr
    assert all(f"sm_{chip}" in done.stdout for chip in chips)


@pytest.mark.parametrize("operator", thinned(operators(), 5, first=4))
def test_no_spills_and_within_the_chips_limits(operator, capsys):
    compiled(capsys, operator, chips=[USUAL])


@pytest.mark.slow
@pytest.mark.parametrize("operator", operators())
def test_no_spills_on_other_chips(operator, capsys):
    compiled(capsys, operator, chips=[chip for chip in CHIPS if chip != USUAL])


@pytest.mark.slow
@pytest.mark.parametrize("operator", operators())
def test_candidates_for_tuning_compile_like_the_tables_choices(operator, capsys):
    compiled(capsys, operator, "--candidates", chips=[USUAL])
