"""The comparison of a finished run: what it refuses, how it reads, and once the whole of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from bench import compare
from fastpeft.config import load_config

ROOT = Path(__file__).resolve().parents[2]


def figures(milliseconds, mebibytes):
    return {
        "median_ms": milliseconds,
        "p20_ms": 0.9 * milliseconds,
        "p80_ms": 1.1 * milliseconds,
        "turns": 20,
        "fraction_of_floor": 5.0 / milliseconds,
        "peak_bytes": mebibytes * 2**20,
    }


def outcome():
    return {
        "run": "out/quickstart",
        "precision": "bf16, as this CPU has amx_bf16",
        "batch_size": 32,
        "memory": "as measured",
        "rows": {
            "linear probe": {
                "trained_parameters": 3850,
                "trained_share": 0.00018,
                "test_accuracy": 0.5,
                "cached_features": "the whole backbone",
                "floor": {"median_ms": 5.0},
                "paths": {"fused": figures(0.03, 70), "literal": figures(9.0, 90)},
            },
            "VPT-Deep, 10 prompts": {
                "trained_parameters": 49930,
                "trained_share": 0.0023,
                "test_accuracy": 0.75,
                "cached_features": None,
                "floor": {"median_ms": 10.0},
                "paths": {"fused": figures(15.0, 373), "literal": figures(170.0, 1404)},
            },
        },
    }


def shown(table):
    console = Console(width=80, record=True, quiet=False, file=open("/dev/null", "w"))
    console.print(table)
    return console.export_text()


def test_table_fits_into_80_columns_and_says_everything():
    text = shown(compare.table(outcome()))
    assert "…" not in text
    for part in ("3,850", "0.02%", "50.00%", "cached", "0.03", "170", "153-187", "33%", "1,404", "literal"):
        assert part in text, part


def test_cached_features_have_no_share_of_the_floor():
    lines = shown(compare.table(outcome())).splitlines()
    assert not any("%" in line.split("cached")[1] for line in lines if " cached " in line)


@pytest.mark.parametrize("made", [False, True], ids=["no folder", "no results"])
def test_an_unfinished_run_is_one_line(tmp_path, capsys, made):
    out = tmp_path / "run"
    if made:
        out.mkdir()
    assert compare.main([str(out)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {out} holds no finished run") and message.count("\n") == 1


def test_probe_trains_the_head_alone():
    config = load_config(ROOT / "configs" / "quickstart.yaml", ["train.lr={vpt: 3e-2, head: 3e-3}", "train.epochs=15"])
    run = {"config": config.model_dump(mode="json")}
    probe = compare._probe_config(run, Path("out"))
    assert probe.method == {"name": "linear"} and probe.train.lr == {"head": 0.003} and probe.train.epochs == 50
    assert probe.data == config.data and Path(probe.out) == Path("out/linear_probe")


@pytest.mark.slow
def test_comparing_a_run(tmp_path):
    out = tmp_path / "run"
    settings = [
        "model.name=vit_tiny_patch16_224",
        "model.weights=random",
        "model.image_size=32",
        "data={name: digits, train_size: 40, test_size: 20}",
        "method.length=2",
        "train.epochs=1",
        "train.warmup_epochs=0",
        "train.batch_size=8",
        f"out={out}",
    ]
    command = [sys.executable, "fastpeft/train.py", "--config", "configs/quickstart.yaml", *settings]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    command = [sys.executable, "-m", "bench.compare", str(out), "--turns", "3", "--budget", "1"]
    for _ in range(2):  # the second finds the probe trained
        done = subprocess.run(command, cwd=ROOT, check=True, timeout=300, capture_output=True, text=True)
    found = json.loads((out / "compare.json").read_text())
    assert set(found["rows"]) == {"linear probe", "VPT-Deep, 2 prompts"}
    for row in found["rows"].values():
        assert 0 <= row["test_accuracy"] <= 1
        for path in ("fused", "literal"):
            assert row["paths"][path]["median_ms"] > 0 and row["paths"][path]["peak_bytes"] > 0
    assert "next      python -m fastpeft.predict" in done.stdout
    assert (out / "curves.png").exists() and len(list(out.glob("example-*.png"))) == 1
