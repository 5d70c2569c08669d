"""`bench.scale` in little: every part measures, writes its row, and says where numbers are beyond their bound."""

from __future__ import annotations

import json
import sys

import psutil
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bench import scale
from bench.scale_parts import products, runs
from tests.kernels.close import error
from tests.thinned import sampled

VIT = "vit/vpt/zero2"
LOSSES = [2.0 - 0.05 * step for step in range(runs.STEPS)]


@pytest.fixture
def scaled(tmp_path, capsys):
    """Run the command in little; its exit status, the rows of a part by name, and what it said."""

    def run(part: str, only: str = ""):
        arguments = ["--tiny", "--parts", part, "--only", only, "--out", str(tmp_path / "scale.json")]
        found = scale.main(arguments)
        rows = json.loads((tmp_path / "scale.json").read_text())["parts"][part]
        return found, rows, capsys.readouterr().out

    return run


@pytest.fixture
def pretended(monkeypatch):
    """Let runs of the training command have these losses: alone, and on two ranks. Counts the runs."""
    made = []

    def pretend(two, one=LOSSES):
        def run(tree, ranks, **_):
            made.append((ranks, tree["train"].get("zero")))
            losses = two if ranks > 1 else one
            if isinstance(losses, Exception):
                raise losses
            return {"history": [{"train_loss": loss} for loss in losses], "peak_memory_mb": 1.0}

        monkeypatch.setattr(runs, "run", run)
        return made

    return pretend


def changed(factor: float) -> list[float]:
    return [*LOSSES[:7], LOSSES[7] * factor, *LOSSES[8:]]


def test_parity_is_of_every_step(scaled, pretended):
    made = pretended(changed(1 + 0.9 * runs.BOUND))
    status, rows, said = scaled("parity")
    assert status == 0 and "0 failed" in said
    assert list(rows) == [
        f"{case}/zero{zero}" for case in ("vit/vpt", "mplug/lora", "mplug/prefix") for zero in (1, 2, 3)
    ]
    # One process for each case, and two at each stage.
    assert made == 3 * [(1, None), (2, 1), (2, 2), (2, 3)]
    for row in rows.values():
        assert row["passed"] and row["steps"] == runs.STEPS and row["bound"] == runs.BOUND and row["tiny"]
        assert row["largest_relative_difference"] == pytest.approx(0.9 * runs.BOUND, rel=1e-6)


@pytest.mark.parametrize(
    "two, difference",
    [
        (changed(1 - 2 * runs.BOUND), 2 * runs.BOUND),
        (LOSSES[:-1], None),
        (changed(float("nan")), None),
        (changed(float("inf")), None),
    ],
    ids=["apart", "a step less", "not a number", "infinite"],
)
def test_runs_that_are_apart_are_flagged_and_tried_again(two, difference, scaled, pretended):
    pretended(two)
    status, rows, said = scaled("parity", VIT)
    assert status == 1 and "1 failed" in said and '"passed": false' in said
    assert list(rows) == [VIT] and rows[VIT]["passed"] is False
    assert rows[VIT]["largest_relative_difference"] == (None if difference is None else pytest.approx(difference))
    # It is not forgotten that the row failed, and once it passes it is not measured any more.
    assert scaled("parity", VIT)[0] == 1
    made = pretended(LOSSES)
    before = len(made)
    assert scaled("parity", VIT)[0] == 0 and len(made) == before + 2
    assert scaled("parity", VIT)[0] == 0 and len(made) == before + 2


@pytest.mark.parametrize("last, passed", [(1.997, True), (2.003, True), (1.999, False), (float("nan"), False)])
def test_runs_that_learn_nothing_say_nothing_of_gradients(last, passed, scaled, pretended):
    losses = [*[2.0] * (runs.STEPS - 1), last]
    pretended(losses, losses)
    status, rows, _ = scaled("parity", VIT)
    assert status == (0 if passed else 1) and rows[VIT]["passed"] is passed
    assert passed == (rows[VIT]["learnt"] >= runs.LEAST_LEARNT)


def test_a_run_that_fails_is_a_row_with_its_error(scaled, pretended):
    pretended(RuntimeError("vit-vpt-2: error:\n  no rank"))
    status, rows, _ = scaled("parity", VIT)
    assert status == 1 and rows[VIT]["error"] == "vit-vpt-2: error: no rank" and "passed" not in rows[VIT]


def step_of(peaks, seconds=1.0):
    """What both ranks say of a form."""
    steps = [{"peak_mb": peak, "seconds": seconds} for peak in peaks]
    return [{"steps": taken, "parameters": 7, "products": "bf16"} for taken in (steps, steps[:1])]


@pytest.mark.parametrize("patched, passed", [(100.0, True), (102.0, True), (102.1, False)])
def test_a_peak_is_the_largest_of_all_steps_and_ranks(patched, passed, scaled, monkeypatch):
    forms = {"patched": step_of([50.0, patched, 60.0]), "plain": step_of([100.0, 10.0, 20.0])}
    monkeypatch.setattr(scale, "_step", lambda folder, model, method, form: forms[form])
    status, rows, said = scaled("peak")
    assert list(rows) == [f"{name}/zero3/bf16" for name in ("vit_tiny/vpt", "vit_tiny/lora", "mplug_tiny/lora")]
    assert status == (0 if passed else 1) and f"{0 if passed else 3} failed" in said
    for row in rows.values():
        assert row["passed"] is passed and row["peak_mb"] == {"patched": patched, "plain": 100.0}
        assert row["bound"] == scale.PEAK_BOUND and row["parameters"] == 7


def test_what_takes_too_long_leaves_nothing_behind(tmp_path):
    seen = tmp_path / "child"
    child = f"import os, time; open({str(seen)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with pytest.raises(RuntimeError, match="a step: not done after 5 s"):
        runs.ended([sys.executable, "-c", parent], "a step", 5)
    assert not psutil.pid_exists(int(seen.read_text()))


class Wide(TorchDispatchMode):
    """Notes which products are taken in fp32, and whether any is not."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in products._PRODUCTS:
            assert all(t.dtype is torch.float32 for t in args if isinstance(t, torch.Tensor)), func
            self.found.add(func)
        return func(*args, **(kwargs or {}))


def layers(x, weight, bias, patches):
    """A bit of a transformer, forward and backward."""
    rows = F.conv2d(x, patches, stride=4).flatten(2).transpose(1, 2)
    hidden = F.linear(rows, weight, bias) @ weight
    heads = hidden.unflatten(-1, (2, 8)).transpose(1, 2)
    attended = F.scaled_dot_product_attention(heads, heads, heads)
    out = attended @ heads.transpose(-1, -2)
    return out.float().square().mean()


def test_products_in_fp32_are_those_of_bf16():
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 16, 16), torch.randn(16, 16) / 4, torch.randn(16) / 4, torch.randn(16, 3, 4, 4) / 7]
    exact = [t.bfloat16().double().requires_grad_() for t in inputs]
    layers(*exact).backward()
    native = [t.bfloat16().requires_grad_() for t in inputs]
    expected = layers(*native)
    expected.backward()
    ours = [t.bfloat16().requires_grad_() for t in inputs]
    with Wide() as seen, products.in_fp32():
        found = layers(*ours)
        found.backward()
    assert len(seen.found) >= 6
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)
    for one, other, true in zip(ours, native, exact, strict=True):
        assert one.grad.dtype is torch.bfloat16
        assert error(one.grad, true.grad) <= 1.5 * error(other.grad, true.grad)


def test_what_is_in_little_is_kept_apart(tmp_path, pretended, scaled, capsys):
    pretended(LOSSES)
    with pytest.raises(SystemExit):
        scale.main(["--tiny", "--parts", "parity"])
    assert "--tiny says nothing about this machine; give --out" in capsys.readouterr().err
    scaled("parity", VIT)
    with pytest.raises(SystemExit):
        scale.main(["--parts", "parity", "--out", str(tmp_path / "scale.json")])
    assert "holds rows in little" in capsys.readouterr().err


def test_losses_of_other_lengths_are_infinitely_apart():
    assert runs.largest_difference([1.0, 2.0], [1.0, 2.0]) == 0
    assert runs.largest_difference([1.0, 2.2], [1.0, 2.0]) == pytest.approx(0.1)
    assert runs.largest_difference([1.0], [1.0, 2.0]) == runs.largest_difference([], [1.0]) == float("inf")


# With DeepSpeed, on two ranks.


@pytest.mark.slow
@pytest.mark.parametrize("only", [VIT, "mplug/prefix/zero3"])
def test_parity_on_ranks(only, scaled):
    status, rows, _ = scaled("parity", only)
    (row,) = rows.values()
    assert status == 0 and row["passed"], row
    assert row["steps"] == runs.STEPS and row["largest_relative_difference"] <= runs.BOUND
    assert row["learnt"] >= runs.LEAST_LEARNT


@pytest.mark.slow
@pytest.mark.parametrize("only", sampled(["2 ranks zero3 to 1 ranks zero0", "1 ranks zero0 to 2 ranks zero3"], 2))
def test_a_run_on_ranks_goes_on(only, scaled):
    status, rows, _ = scaled("resume", only)
    (row,) = rows.values()
    assert status == 0 and row["passed"] and row["steps"] == runs.STEPS, row


@pytest.mark.slow
def test_a_run_that_begins_anew_has_not_gone_on(scaled, monkeypatch):
    """Its losses are the same, which says nothing."""
    monkeypatch.setattr(scale, "_interrupted", lambda tree, ranks: None)
    status, rows, _ = scaled("resume", "2 ranks zero3 to 1 ranks zero0")
    (row,) = rows.values()
    assert status == 1 and "did not say 'resuming" in row["error"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sampled(["mplug_tiny/lora", "vit_tiny/vpt"], 2))
def test_peaks_on_ranks(name, scaled, monkeypatch):
    # Models of this size are lost in what Python itself occupies, and so is the difference of two forms of one.
    monkeypatch.setattr(scale, "PEAK_BOUND", 1.2)
    status, rows, _ = scaled("peak", name)
    (row,) = rows.values()
    assert status == 0 and row["passed"], row
    for form in ("patched", "plain"):
        ranks = row[form]
        assert len(ranks) == 2 and all(len(rank["steps"]) == 3 for rank in ranks)
        # No rank holds a whole model between steps, and a step has a loss.
        for rank in ranks:
            assert rank["left_gathered"] < 0.5 * rank["parameters"]
            assert all(0 < step["loss"] < 100 and step["peak_mb"] >= step["resident_mb"] for step in rank["steps"])
        peaks = [step["peak_mb"] for rank in ranks for step in rank["steps"]]
        assert row["peak_mb"][form] == max(peaks) < 5000
    assert row["patched"][0]["trained"] == row["plain"][0]["trained"]
    assert row["patched"][0]["parameters"] == row["plain"][0]["parameters"]
