"""Rows in other processes: one that crashes or hangs is a row's error, and the next row runs."""

from __future__ import annotations

import sys
import time

import pytest

from bench.device_parts.workers import Turns, Worker

# Speaks as `serve` does, without torch to be imported.
SCRIPT = """
import json, os, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    key = line.strip()
    if key == "crash":
        os._exit(7)
    if key == "hang":
        time.sleep(600)
    if key == "fail":
        print(json.dumps({"variants": {"a": {"error": "an illegal access"}}}), flush=True)
        continue
    print(json.dumps({"passed": True, "key": key, "process": os.getpid()}), flush=True)
"""


@pytest.fixture
def worker(tmp_path):
    worker = Worker([sys.executable, "-c", SCRIPT], tmp_path / "log", limit=60.0)
    yield worker
    worker.close()


def test_one_process_serves_many_rows(worker):
    first, second = worker("a"), worker("b")
    assert (first["key"], second["key"]) == ("a", "b")
    assert first["process"] == second["process"]


def test_an_error_ends_the_process_whose_device_it_may_have_broken(worker):
    first = worker("a")["process"]
    assert worker("fail")["variants"]["a"]["error"] == "an illegal access"
    assert worker("b")["process"] != first


def test_a_crash_costs_its_row(worker):
    assert "ended with status 7" in worker("crash")["error"]
    assert worker("next")["passed"]


def test_a_hang_costs_its_row(worker):
    worker.start()
    worker.limit = 2.0
    begin = time.perf_counter()
    assert "stopped after 2 s" in worker("hang")["error"]
    assert time.perf_counter() - begin < 30
    worker.limit = 60.0
    assert worker("next")["passed"]


def test_nothing_goes_on_past_the_end(worker):
    worker.start()
    worker.until = time.perf_counter() + 1
    begin = time.perf_counter()
    assert "stopped after" in worker("hang")["error"]
    assert time.perf_counter() - begin < 30


def test_a_process_that_cannot_start_is_told(tmp_path):
    broken = Worker([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log", limit=60.0)
    with pytest.raises(RuntimeError, match="ended with status 3 at its start"):
        Turns([("a", dict)], 60.0, lambda key, row: None).among([broken])


def test_rows_are_shared_among_processes(tmp_path, capsys):
    rows, found = [(name, dict) for name in "abcdef"], {}
    workers = [Worker([sys.executable, "-c", SCRIPT], tmp_path / "log", limit=60.0) for _ in range(2)]
    assert Turns(rows, 60.0, found.__setitem__).among(workers) == 6
    assert set(found) == set("abcdef") and all(row["passed"] for row in found.values())
    assert capsys.readouterr().out.count("done") == 6
