"""The CPU benchmark in little: every row runs and resumes, goals say what was found, and documents follow results."""

from __future__ import annotations

import json

import pytest
import torch

from bench.cases import token_rows
from bench.cpu import __main__ as command
from bench.cpu import goals, idle, rows, tables
from bench.cpu.floor import Floor
from bench.cpu.rows import FLOOR, GROUPS, MAIN, SAVED, TIMED, Settings
from bench.cpu.shapes import VIT_B, Models, Shape
from bench.cpu.variants import Variant, model_of
from fastpeft import _native

LITTLE = Shape(VIT_B, 16, tiny=True)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The result file of a sweep in little, but for what takes a process of its own."""
    path = tmp_path_factory.mktemp("cpu") / "cpu.json"
    assert command.main(["--tiny", "--turns", "1", "--out", str(path), "--only", "s*"]) == 0
    return path


def test_a_sweep_holds_every_row_with_all_that_took_turns(swept):
    parts = json.loads(swept.read_text())["parts"]
    assert parts["steps"].keys() == {f"{shape}/{group}" for shape, groups in TIMED for group in groups}
    for key, row in parts["steps"].items():
        *_, dtype, threads, group = key.split("/")
        names = [name for name in GROUPS[group] if name != FLOOR or dtype == "bf16"]
        assert list(row["variants"]) == names and row["tiny"] and f"{row['threads']}t" == threads
        assert all(0 < figures["p25_ms"] <= figures["p75_ms"] for figures in row["variants"].values())
        assert ("floor" in row) == (FLOOR in row["variants"])
    assert parts["saved"].keys() == {f"{MAIN}/{variant}" for variant in SAVED}
    kept = {variant.method: {} for variant in SAVED}
    for variant in SAVED:
        kept[variant.method][variant.who] = parts["saved"][f"{MAIN}/{variant}"]["bytes_per_number"]
    for figures in kept.values():
        assert figures["small"] < figures["balanced"] <= figures["fast"]


def test_a_second_sweep_has_nothing_left_to_do_and_keeps_to_its_kind(swept, capsys):
    before = swept.read_text()
    assert command.main(["--tiny", "--out", str(swept), "--only", "s*"]) == 0
    out = capsys.readouterr().out
    assert (
        "[1/" not in out and "none of these figures says anything" in out and goals.MISSING not in out.split("Goals")[1]
    )
    assert command.main(["--out", str(swept)]) == 2
    assert command.main(["--tiny"]) == 2
    assert swept.read_text() == before


def test_a_broken_row_is_an_error_that_is_tried_again(tmp_path, monkeypatch):
    path, arguments = tmp_path / "cpu.json", ["--tiny", "--turns", "1", "--only", "saved/*small vpt-1"]

    def broken(*_):
        raise RuntimeError("no such thing")

    with monkeypatch.context() as patched:
        patched.setattr(rows, "saved_bytes", broken)
        assert command.main([*arguments, "--out", str(path)]) == 1
    (row,) = json.loads(path.read_text())["parts"]["saved"].values()
    assert row["error"] == "RuntimeError: no such thing"
    assert command.main([*arguments, "--out", str(path)]) == 0
    (row,) = json.loads(path.read_text())["parts"]["saved"].values()
    assert row["saved_bytes"] > 0


def test_nothing_is_measured_on_a_busy_machine(monkeypatch):
    monkeypatch.setattr(idle, "load", lambda: 0.5)
    with pytest.raises(idle.BusyError, match=r"0\.50 cores"):
        idle.wait(0.0)
    monkeypatch.setattr(idle, "load", lambda: 0.01)
    assert idle.wait(0.0) == 0.01


def test_a_row_during_which_others_compute_is_no_row(monkeypatch):
    monkeypatch.setattr(rows, "interleave", lambda *_, **__: None)
    monkeypatch.setattr(idle, "load", lambda: 0.0)
    monkeypatch.setattr(idle.Others, "cores", lambda self: 0.3)
    shape = Shape(VIT_B, 16, tiny=True)
    monkeypatch.setattr(rows, "step_of", lambda *_: None)
    with pytest.raises(idle.BusyError, match=r"0\.30 cores"):
        rows.timed(shape, ("ours lora",), Settings(), Models())


def test_own_work_is_not_that_of_others(tmp_path, monkeypatch):
    tick = idle.os.sysconf("SC_CLK_TCK")
    clock, own = [10.0], [1.0]
    monkeypatch.setattr(idle, "_STAT", tmp_path / "stat")
    monkeypatch.setattr(idle.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(idle.os, "times", lambda: (own[0], 0.0, 0.5, 0.0, clock[0]))

    def system(user, steal):
        numbers = [user * tick, 0, tick, 99 * tick, 99 * tick, 0, 0, steal * tick, 0, 0]
        (tmp_path / "stat").write_text(f"cpu  {' '.join(map(str, numbers))}\ncpu0 0 0\n")

    system(user=50, steal=3)
    others = idle.Others()
    # Ten seconds on: five of this process, two of others and one stolen.
    clock[0], own[0] = 20.0, 6.0
    system(user=57, steal=4)
    assert others.cores() == pytest.approx(0.3)
    monkeypatch.setattr(idle, "_STAT", tmp_path / "no such file")
    assert idle.load() is None


def test_the_floor_is_the_products_of_all_blocks():
    plain = Models().copy(LITTLE)
    count = token_rows(plain, LITTLE.images)
    floor = Floor(plain, count)
    assert floor.operations == 4 * count * sum(
        p.numel() for name, p in plain.blocks.named_parameters() if name.endswith("weight") and p.dim() == 2
    )
    assert len(floor.choices) == 8 and len(floor._products) == 16
    for product, x, y in floor._products:
        made = product(x, y)
        assert made.shape == y.shape and made.isfinite().all()


def test_all_ways_to_multiply_agree():
    from bench.cpu import floor

    x, w = torch.randn(40, 64).bfloat16(), torch.randn(96, 64).bfloat16()
    for given in (w, w.t().contiguous().t()):
        for way in floor._ways(40, dtype=x.dtype).values():
            y = torch.empty(40, 96, dtype=torch.bfloat16)
            torch.testing.assert_close(way(given)(x, y), x @ w.t(), rtol=0.02, atol=0.2)


def test_timm_computes_the_same_gradients():
    model = model_of(Variant("timm", "vpt-1"), LITTLE, Models())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "pos_embed",
        "head.weight",
        "head.bias",
    }


def test_there_are_no_other_variants():
    for text in ("theirs lora", "timm lora"):
        with pytest.raises(ValueError, match="no variant"):
            model_of(Variant.of(text), LITTLE, Models())


@pytest.mark.skipif(_native.cpu_level() != "amx", reason="the native branches need AMX")
def test_the_breakdown_watches_every_native_call(tmp_path, capsys):
    path = tmp_path / "cpu.json"
    assert command.main(["--tiny", "--turns", "1", "--breakdown", "--out", str(path)]) == 0
    found = json.loads(path.read_text())["parts"]["breakdown"]
    row = found[f"{MAIN}/ours lora"]
    labels = {call["label"]: call for call in row["calls"]}
    # Width 128, two blocks, the last one's attention for the class token alone.
    assert labels["product 512 -> 128, residual"]["calls"] == 2
    assert {"layer norm, product 128 -> 384, rank 32", "layer norm backward", "optimizer"} <= labels.keys()
    assert all(call["bytes"] > 0 for label, call in labels.items() if label not in ("optimizer", "patch embedding"))
    assert sum(call["ms"] for call in row["calls"]) < row["step_ms"]
    out = capsys.readouterr().out
    assert "the rest" in out and "of floor" in out
    from fastpeft.native import gemm, low_rank

    assert low_rank.gemm is gemm.gemm and not hasattr(gemm.gemm, "__wrapped__")


def test_peak_memory_is_measured_in_another_process():
    found = rows.peak(LITTLE, Variant("small", "vpt-1"))
    assert found["peak_bytes"] > 0 and found["tiny"]


def measured(**medians):
    """Results whose rows hold these medians, with a spread of a tenth: row and variant -> milliseconds."""
    steps = {}
    for name, median in medians.items():
        group, who, method = name.split("__")
        key = f"{who} {method.replace('_', '-')}" if method else who
        turns = [0.9 * median, median, 1.1 * median]
        row = steps.setdefault(f"{MAIN}/{group.replace('_', '-')}", {"variants": {}, "batch": 16})
        row["variants"][key] = {"median_ms": median, "turns_ms": turns}
    return {"steps": steps}


def line(parts, start):
    return next(goal for goal in goals.lines(parts) if goal[0].startswith(start))


def test_goals_say_what_was_found_and_whether_it_is_enough():
    parts = measured(own__F__=100.0, own__ours__vpt_1=130.0, own__ours__lora=147.0, own__timm__vpt_1=290.0)
    found = line(parts, "VPT-Deep, 1 prompt")
    assert found[1:] == ("1.30 F; timm 2.90 F", "1.4 F", "1 F", "yes")
    assert line(parts, "LoRA r=8 on q, k, v: time")[1:] == ("1.13x", "1.12x", "1.04x", "no, by less than 2%")
    assert line(parts, "LoRA r=8 on q, k, v: speed")[1:] == (goals.MISSING, "2.5x", "3.5x", "")
    fast = measured(vpt_200__ours__vpt_200=10.0, vpt_200__literal__vpt_200=71.0)
    assert line(fast, "VPT-Deep, 200 prompts, no dropout: speed")[1::3] == ("7.10x", "yes, the aim too")
    slow = measured(full__ours__full=10.0, full__timm__full=14.0)
    assert line(slow, "Full")[-1] == "no"


def test_ratios_spread_over_rounds_not_over_variants():
    row = {"variants": {"a": {"median_ms": 2, "turns_ms": [2, 4, 6]}, "b": {"median_ms": 1, "turns_ms": [1, 2, 3]}}}
    assert rows.ratios(row, "a", "b") == (2.0, 2.0, 2.0)
    assert rows.ratios(row, "a", "c") is None


def test_saved_bytes_decide_by_the_worst_method():
    saved = {
        f"{MAIN}/fast {name}": {"bytes_per_number": value} for name, value in {"vpt-1": 18.0, "lora": 18.5}.items()
    }
    assert line({"saved": saved}, 'Saved for backward, memory="fast"')[1] == goals.MISSING
    saved[f"{MAIN}/fast vpt-200"] = {"bytes_per_number": 21.0}
    found = line({"saved": saved}, 'Saved for backward, memory="fast"')
    assert found[1] == "21.00 B (vpt-1 18.00, vpt-200 21.00, lora 18.50)" and found[-1] == "no"


def test_no_row_no_number():
    assert {found[1] for found in goals.lines({})} == {goals.MISSING}
    assert len(goals.lines({})) == len(goals.GOALS)


def test_the_documentation_holds_the_committed_results():
    document = tables.DOCUMENT.read_text()
    part = tables.rendered(tables.committed())
    assert tables.documented(document) == part, "run `python -m bench.cpu --write-docs`"
    assert tables.rewritten(document, part) == document
    assert tables.documented(tables.rewritten(document, "something else")) == "something else"
