"""Kernels that somebody broke: the emulator says so, whatever the numbers are."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from tests.cuda.emulation import ROOT, build, compiler

FORWARD = "prompt_attention_forward.cu"
# Of a library of operators there can be one a process.
RUN = """
import sys, torch
from pathlib import Path
from tests.cuda.emulation import Emulator
q = torch.randn(1, 1, 70, 80).bfloat16()
try:
    Emulator(Path(sys.argv[1])).attention_forward(q, q, q, q[0, :, :3], q[0, :, :3], 0.125, False)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    "right, wrong, said",
    [
        ("block_sync();  // the tile", "// the tile", "no barrier in between"),
        ("copy_wait<0>();", "copy_wait<1>();", "a copy is on its way"),
        pytest.param(
            "warp_sync();  // the warp's", "// the warp's", "no barrier in between", marks=pytest.mark.exhaustive
        ),
        ("HeadRows(p.q, batch, head, first, p.queries)", "HeadRows(p.q, batch, head, first, 4096)", "outside of every"),
        pytest.param(
            "if (!active) return;", "if (lane_index() > 3) return;", "never come", marks=pytest.mark.exhaustive
        ),
        ("if (i + 1 < tiles.count) start_tile", "start_tile", "ends before its copies have arrived|outside of every"),
        pytest.param("lane_index() % 4 == 0 && row", "row", "written twice", marks=pytest.mark.exhaustive),
    ],
)
def test_faults_are_found(tmp_path, right, wrong, said):
    source = tmp_path / "cuda"
    shutil.copytree(ROOT / "csrc/cuda", source)
    text = (source / FORWARD).read_text()
    assert right in text
    (source / FORWARD).write_text(text.replace(right, wrong))
    library = build(tmp_path, source)
    result = subprocess.run([sys.executable, "-c", RUN, str(library)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.search(said, result.stdout), result.stdout or "nothing was found"
