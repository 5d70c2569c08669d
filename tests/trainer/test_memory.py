"""Peak memory: of what came after it was last forgotten."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from fastpeft.trainer import memory

MIB = 2**20


# In a process of its own: whether memory that was given back leaves the process depends on all that ran in it before.
MEASURE = """
import torch
from fastpeft.trainer import memory, results

def use(mebibytes):
    torch.ones(mebibytes * 2**20, dtype=torch.uint8)

use(256)
large = memory.peak_resident()
forgotten = memory.forget_peak()
after, before = memory.peak_resident(), memory.resident()
use(64)
host = results.peak_memory_mb(torch.device("cpu"))["host"]
print(forgotten, large, after, before, memory.peak_resident(), int(host * 2**20))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_a_peak_is_of_what_came_after_it_was_forgotten():
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    forgotten, *numbers = done.stdout.split()
    if forgotten == "False":
        pytest.skip("this system does not forget a peak")
    large, after, before, again, host = map(int, numbers)
    assert after < large - 200 * MIB
    assert before + 60 * MIB < again < large - 100 * MIB
    assert host == pytest.approx(again, abs=MIB)


def test_a_request_that_is_taken_and_not_followed(monkeypatch, tmp_path):
    status = tmp_path / "status"
    status.write_text("VmHWM:\t900000 kB\nVmRSS:\t400000 kB\n")
    monkeypatch.setattr(memory, "_STATUS", status)
    monkeypatch.setattr(memory, "_FORGET", tmp_path / "clear_refs")
    assert not memory.forget_peak() and (tmp_path / "clear_refs").read_text() == "5"
    status.write_text("VmHWM:\t400100 kB\nVmRSS:\t400000 kB\n")
    assert memory.forget_peak()


def test_where_the_system_forgets_nothing_it_is_the_process(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "no" / "status")
    monkeypatch.setattr(memory, "_FORGET", tmp_path / "no" / "clear_refs")
    assert not memory.forget_peak()
    unit = 1 if sys.platform == "darwin" else 1024
    assert memory.peak_resident() == memory.resident() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
