"""The on-device checks in little, on the CPU: they run, resume, and report what fails."""

from __future__ import annotations

import json

import pytest

from bench import device


def run(tmp_path, *arguments):
    return device.main(["--device", "cpu", "--tiny", "--out", str(tmp_path / "device.json"), *arguments])


def test_verify_then_nothing_left_to_do(tmp_path, capsys):
    arguments = ("--part", "verify", "--methods", "vpt-deep-10,mlp-3")
    assert run(tmp_path, *arguments) == 0
    assert capsys.readouterr().out.count(" ok ") == 7
    assert run(tmp_path, *arguments) == 0
    assert "[1/" not in capsys.readouterr().out


def test_steps_with_time_memory_and_floor(tmp_path):
    assert run(tmp_path, "--part", "steps", "--methods", "vpt-deep-10") == 0
    data = json.loads((tmp_path / "device.json").read_text())
    (key, row) = next(iter(data["parts"]["steps"].items()))
    assert key == "vit_base_patch16_224-tiny-32px/b2/float32/eager/vpt-deep-10"
    assert set(row["variants"]) == {"fused", "literal"}
    for figures in row["variants"].values():
        assert figures["median_ms"] > 0 and figures["saved_bytes"] > 0 and figures["peak_bytes"] > 0
    assert row["variants"]["fused"]["saved_bytes"] < row["variants"]["literal"]["saved_bytes"]
    assert data["runs"][0]["device"] and data["runs"][0]["versions"]["torch"]


def test_a_spent_budget_leaves_rows_for_the_next_call(tmp_path, capsys):
    arguments = ("--part", "verify", "--methods", "linear")
    assert run(tmp_path, *arguments, "--budget", "0") == 0
    assert "3 rows are left" in capsys.readouterr().out
    assert run(tmp_path, *arguments) == 0
    assert "[3/3]" in capsys.readouterr().out


def test_a_row_that_fails_is_reported_and_the_others_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(device.METHODS, "linear", lambda: 1 / 0)
    assert run(tmp_path, "--part", "verify", "--methods", "linear,bias") == 1
    out = capsys.readouterr().out
    assert "ERROR ZeroDivisionError" in out and out.count(" ok ") == 4


def test_an_unknown_method_is_named(tmp_path):
    with pytest.raises(SystemExit, match="no vpt; there are"):
        run(tmp_path, "--methods", "vpt")
