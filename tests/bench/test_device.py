"""The on-device program in little, on the CPU: every part runs, resumes, and reports what fails."""

from __future__ import annotations

import json
import re

import pytest

from bench import device
from tests.thinned import thinned

B16 = "vit_base_patch16_224"


def run(tmp_path, *arguments):
    common = ("--device", "cpu", "--tiny", "--workers", "0", "--turns", "1", "--backends", "reference")
    return device.main([*common, "--out", str(tmp_path / "device.json"), *arguments])


def held(tmp_path, part):
    return json.loads((tmp_path / "device.json").read_text())["parts"][part]


@pytest.mark.parametrize("more", [("", ""), pytest.param((",mlp", ",mlp-3"), marks=pytest.mark.slow)], ids=str)
def test_verify_checks_operators_and_steps_and_then_has_nothing_left_to_do(more, tmp_path, capsys):
    operators, methods = f"layer_norm{more[0]}", f"vpt-deep-10{more[1]}"
    arguments = ("--part", "verify", "--operators", operators, "--methods", methods)
    assert run(tmp_path, *arguments) == 0
    rows = held(tmp_path, "verify")
    steps = [row for key, row in rows.items() if key.startswith("step/")]
    assert len(steps) == (7 if more[1] else 4) and all(row["passed"] and row["seed"] for row in steps)
    kernels = {key: row for key, row in rows.items() if key.startswith("operator/layer_norm/triton/float16/")}
    assert len(kernels) == 2
    for row in kernels.values():
        assert row["passed"] and 0 < row["relative_error"] <= row["bound"]
    # Interpreted kernels are not a chip's, whatever they get right.
    assert "unavailable" in rows["operator/layer_norm/triton/bfloat16/every case"]
    out = capsys.readouterr().out
    assert "run in little: shows nothing about fastpeft/ops/proven.py" in out
    assert run(tmp_path, *arguments) == 0
    again = capsys.readouterr().out
    assert "float16" in again and "] operator/layer_norm/triton/float16" not in again


@pytest.mark.parametrize("operators", thinned(["layer_norm,lora_linear", "prompt_attention,adapter,mlp,layer_norm"], 2))
def test_ops_times_every_way_to_compute_a_problem(operators, tmp_path, capsys):
    assert run(tmp_path, "--part", "ops", "--operators", operators) == 0
    rows = held(tmp_path, "ops")
    assert {key.split("/")[0] for key in rows} == {*operators.split(",")}
    for row in rows.values():
        assert row["ceilings"]["gemm_tflops"] > 0 and row["ceilings"]["memory_gbs"] > 0
        assert row["bytes"]["both"] > row["bytes"]["forward"] > 0
        for name in ("reference", *(name for name in row["variants"] if name.startswith("triton"))):
            variant = row["variants"][name]
            assert variant["passed"] and variant["both"]["median_ms"] > 0 and variant["forward"]["median_ms"] > 0
            assert variant["both"]["of_memory_ceiling"] > 0
    liger = next(row for key, row in rows.items() if key.startswith("layer_norm"))["variants"]["liger"]
    assert "both" in liger or "liger_kernel is not installed" in liger["unavailable"]
    assert "leaves work out" in capsys.readouterr().out


@pytest.mark.slow
def test_tune_keeps_the_choices_of_operators_and_steps(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FASTPEFT_CACHE", str(tmp_path / "cache"))
    arguments = ("--part", "tune", "--operators", "layer_norm", "--methods", "vpt-deep-1", "--model", B16)
    assert run(tmp_path, *arguments) == 0
    rows = held(tmp_path, "tune")
    chosen = {key: row["choices"] for key, row in rows.items()}
    assert {key.split("/")[0] for key in rows} == {"layer_norm", f"{B16}-tiny-32px"}
    (step,) = (choices for key, choices in chosen.items() if "/train/vpt-deep-1" in key)
    assert {key.split(" ")[0] for key in step} >= {"layer_norm._forward_kernel", "mlp.mlp_activate"}
    for entry in step.values():
        assert entry["measured"] > 1 and entry["seconds"] > 0 and entry["refused"] == []
    assert "classes of launches" in capsys.readouterr().out
    # What the interpreter's times say is nothing, and must not be found by the library.
    assert not (tmp_path / "cache").exists()


def test_steps_have_time_memory_floor_and_goals(tmp_path, capsys):
    methods = "vpt-deep-1,vpt-deep-200-batch-mask"
    assert run(tmp_path, "--part", "steps", "--methods", methods, "--model", B16) == 0
    rows = held(tmp_path, "steps")
    row = rows[f"{B16}-tiny-32px/b2/float32/train/vpt-deep-200-batch-mask"]
    assert set(row["variants"]) == {"reference", "literal"}
    for figures in row["variants"].values():
        assert figures["median_ms"] > 0 and figures["saved_bytes"] > 0 and figures["of_gemm_ceiling"] > 0
    assert row["variants"]["reference"]["saved_bytes"] < row["variants"]["literal"]["saved_bytes"]
    assert row["floor"]["median_ms"] > 0
    own = rows[f"{B16}-tiny-32px/b2/float32/train/own"]["variants"]
    assert set(own) == {f"{method} reference" for method in methods.split(",")}
    merged = rows[f"{B16}-tiny-32px/b2/float32/inference/vpt-deep-200-batch-mask"]["variants"]
    assert set(merged) == {"reference-merged", "literal", "plain"}
    goals = {line[:40]: line for line in capsys.readouterr().out.splitlines()}
    assert "x as fast" in goals["VPT-Deep p=200, batch mask, against lite"]
    assert goals["LoRA against own VPT p=1" + " " * 16].endswith("not measured")


@pytest.mark.slow
def test_large_models_and_batches_are_rows_of_steps(tmp_path):
    assert run(tmp_path, "--part", "steps", "--methods", "lora-qkv-8") == 0
    trained = [key for key in held(tmp_path, "steps") if "/train/" in key]
    assert [key.split("-tiny")[0] for key in trained] == [
        "vit_base_patch16_224",
        "vit_huge_patch14_224",
        "vit_large_patch16_224",
        "vit_base_patch16_224",
    ]
    assert [key.split("/")[1] for key in trained] == ["b2", "b2", "b2", "b8"]


@pytest.mark.slow
def test_compiled_code_is_beside_the_library(tmp_path):
    assert run(tmp_path, "--part", "compiled", "--methods", "vpt-deep-200-batch-mask") == 0
    train, inference = held(tmp_path, "compiled").values()
    assert set(train["variants"]) == {"reference", "literal", "literal-compiled"}
    assert set(inference["variants"]) == {"reference-merged", "literal", "plain", "plain-compiled"}
    assert train["torch_compile"] == {"backend": "aot_eager"}
    assert train["variants"]["literal-compiled"]["median_ms"] > 0


def test_the_summary_measures_nothing(tmp_path, capsys):
    assert run(tmp_path, "--part", "summary") == 0
    goals = capsys.readouterr().out.split("run in little")[0].splitlines()[1:]
    assert len(goals) == 7 and all(goal.endswith("not measured") for goal in goals)
    assert not (tmp_path / "device.json").exists()


def test_the_file_names_machine_versions_and_command(tmp_path):
    assert run(tmp_path, "--part", "ops", "--operators", "layer_norm") == 0
    data = json.loads((tmp_path / "device.json").read_text())
    run_of = data["runs"][next(iter(data["parts"]["ops"].values()))["run"]]
    assert run_of["device"] and run_of["versions"]["torch"] and run_of["date"] and run_of["command"]


@pytest.mark.slow
def test_a_spent_budget_leaves_rows_for_the_next_call(tmp_path, capsys):
    arguments = ("--part", "verify", "--operators", "layer_norm", "--methods", "linear")
    assert run(tmp_path, *arguments, "--budget", "0") == 0
    # One row, whichever it is, has run.
    said = capsys.readouterr().out
    total = int(re.search(r"\[1/(\d+)\]", said)[1])
    assert total > 1 and f"{total - 1} rows are left" in said
    assert run(tmp_path, *arguments) == 0
    assert "time is up" not in capsys.readouterr().out


def test_a_row_that_fails_is_reported_repeated_and_costs_no_other(tmp_path, capsys, monkeypatch):
    arguments = ("--part", "verify", "--operators", "layer_norm", "--methods", "linear,bias")
    with monkeypatch.context() as patch:
        patch.setitem(device.Settings.__init__.__globals__["METHODS"], "linear", lambda: 1 / 0)
        assert run(tmp_path, *arguments) == 1
    assert "ERROR ZeroDivisionError" in capsys.readouterr().out
    rows = held(tmp_path, "verify")
    assert all(row["passed"] for key, row in rows.items() if key.endswith("/bias"))
    assert all("error" in row for key, row in rows.items() if key.endswith("/linear"))
    assert run(tmp_path, *arguments) == 0
    assert all(row["passed"] for key, row in held(tmp_path, "verify").items() if key.endswith("/linear"))


@pytest.mark.slow
def test_rows_in_a_process_of_their_own(tmp_path):
    out = str(tmp_path / "device.json")
    arguments = ["--part", "ops", "--operators", "layer_norm", "--device", "cpu", "--tiny", "--turns", "1"]
    assert device.main([*arguments, "--workers", "1", "--out", out]) == 0
    (row,) = held(tmp_path, "ops").values()
    assert row["variants"]["reference"]["both"]["median_ms"] > 0
    assert (tmp_path / "device.log").exists()


@pytest.mark.parametrize(("option", "name"), [("methods", "vpt"), ("operators", "softmax"), ("backends", "tpu")])
def test_an_unknown_name_is_told(tmp_path, option, name):
    with pytest.raises(SystemExit, match=f"--{option}: no {name}; there are"):
        run(tmp_path, f"--{option}", name)
