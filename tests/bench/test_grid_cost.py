"""The measurement of what a grid costs: that it compares what it says."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("optuna")
pytest.importorskip("deepspeed")

from bench import grid_cost
from bench.tables.__main__ import main


def test_a_grid_against_its_runs_one_by_one(vtab, tmp_path, capsys):
    out = tmp_path / "grid_cost.json"
    command = ["--data", str(vtab), "--task", "eurosat", "--backbone", "test_vit@random", "--image-size", "32"]
    assert grid_cost.main([*command, "--epochs", "2", "--separate", "2", "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["parts"]["grid"].values()
    assert row["points"] == 40 and row["separate_runs"] == 2 and row["rows_that_differ"] == []
    alone = row["separate_run_mean"][row["counted"]] * row["points"]
    assert row["ratio"] == pytest.approx(row["side_by_side"][row["counted"]] / alone, rel=0.05)
    assert "rows that differ: none" in capsys.readouterr().out


def test_a_row_that_differs_is_named(vtab, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grid_cost, "_study", lambda jobs, out, at_once: [{"accuracy": str(at_once)} for _ in jobs])
    command = ["--data", str(vtab), "--task", "eurosat", "--backbone", "test_vit@random", "--image-size", "32"]
    assert grid_cost.main([*command, "--epochs", "2", "--separate", "1", "--out", str(tmp_path / "a.json")]) == 0
    assert "rows that differ: eurosat linear search base_lr=50;weight_decay=0.01 seed 0" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["-1", "nan", "inf"])
def test_a_size_that_is_none(vtab, tmp_path, capsys, size):
    command = ["vpt-1", "--backbone", "test_vit@random", "--data", str(vtab), "--out", str(tmp_path / "out")]
    assert main([*command, f"--features-gb={size}"]) == 2
    assert "--features-gb must be a number of gigabytes from 0" in capsys.readouterr().err


def test_unknown_method(vtab, capsys):
    assert grid_cost.main(["--data", str(vtab), "--task", "eurosat", "--methods", "linea"]) == 2
    assert "did you mean 'linear'?" in capsys.readouterr().err
