"""What the on-device program needs around its measurements: recorded steps, wheels, the trainer under ZeRO."""

from __future__ import annotations

import json
import sys
import zipfile

import pytest
import torch

import fastpeft
from bench import device
from bench.cases import TrainingStep, batch, create_model
from bench.device_parts import timed, wheels, zero
from bench.device_parts.models import GraphedStep
from bench.device_parts.settings import Settings


def test_a_recorded_step_is_the_same_step_until_it_is_replayed():
    images, labels = batch(4, 32, 5, torch.float32, "cpu")
    recorded, replayed, losses = [], [], []

    def capture(function):
        recorded.append(function)
        return lambda: replayed.append(True), torch.tensor(7.0)

    for kind in (TrainingStep, GraphedStep):
        torch.manual_seed(0)
        model = create_model("vit_tiny_patch16_224", 5, 32, depth=2)
        fastpeft.patch(model, fastpeft.VPT(3, dropout=0.0))
        step = kind(model, images, labels, **({} if kind is TrainingStep else {"capture": capture}))
        losses.append([float(step()) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][2] < losses[0][0]
    assert not recorded
    assert [float(step()) for _ in range(2)] == [7.0, 7.0]
    assert len(recorded) == 1 and len(replayed) == 2


class Breaking(TrainingStep):
    """Takes as many steps as it has, then fails."""

    left = 0

    def __call__(self):
        if self.left == 0:
            raise RuntimeError("the recording is gone")
        self.left -= 1
        return super().__call__()


@pytest.mark.parametrize("left", [0, 6], ids=["at once", "in turns"])
def test_a_recorded_step_that_breaks_costs_the_others_nothing(left):
    settings = Settings(device._parser().parse_args(["--device", "cpu", "--tiny", "--turns", "1"]))
    images, labels = batch(2, 32, 5, torch.float32, "cpu")
    model = create_model("vit_tiny_patch16_224", 5, 32, depth=1)

    def breaking():
        step = Breaking(model, images, labels)
        step.left = left
        return step

    prepared = [("broken-graph", breaking), ("sound", lambda: TrainingStep(model, images, labels))]
    found = timed.row(settings, settings.shape(), None, iter(prepared), 1.0)["variants"]
    assert found["sound"]["median_ms"] > 0
    assert "the recording is gone" in found["broken-graph"]["error"]
    assert "median_ms" not in found["broken-graph"]


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A folder with a wheel of one module, and a path that is put back afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setattr(wheels.tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "carried_by_hand-1.0-py3-none-any.whl", "w") as archive:
        info = "carried_by_hand-1.0.dist-info"
        archive.writestr("carried_by_hand.py", "answer = 42\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried-by-hand\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return folder


def test_wheels_are_importable_here_and_in_processes_that_follow(wheel):
    target = wheels.add(wheel)
    import carried_by_hand

    assert carried_by_hand.answer == 42
    assert wheels.os.environ["PYTHONPATH"].startswith(f"{target}:") or sys.platform == "win32"
    before = target.stat().st_mtime_ns
    assert wheels.add(wheel) == target and target.stat().st_mtime_ns == before


def test_without_wheels_nothing_changes(tmp_path):
    path = list(sys.path)
    assert wheels.add(tmp_path) is None
    assert sys.path == path


def test_a_broken_wheel_is_told(wheel):
    (wheel / "carried_by_hand-1.0-py3-none-any.whl").write_bytes(b"not a wheel")
    with pytest.raises(RuntimeError, match="pip cannot unpack"):
        wheels.add(wheel)


def zero_rows(tmp_path):
    out = tmp_path / "device.json"
    arguments = ["--part", "zero", "--device", "cpu", "--tiny", "--workers", "0", "--backends", "reference"]
    status = device.main([*arguments, "--out", str(out)])
    return status, json.loads(out.read_text())["parts"]["zero"]


def test_zero_names_what_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(zero._MODULES, "hjson", "there_is_no_such_module")
    status, rows = zero_rows(tmp_path)
    assert status == 0
    assert list(rows) == ["test_vit/zero1/fp32/reference", "test_vit/zero3/fp32/reference"]
    for row in rows.values():
        assert row["unavailable"] == "hjson is not installed; put its wheel under wheels/"


def test_zero_compares_with_the_run_without(tmp_path, monkeypatch):
    def run(settings, model, stage, precision, backend):
        tensors = {"head.weight": torch.full((3,), 1.0 + (0.1 if stage == 3 else 0.0))}
        found = {"history": [{"train_loss": 1.0}] * 4, "ms_per_image": 1.0, "peak_memory_mb": {"host": 1.0}}
        return tensors, found | {"precision": precision, "versions": {}}

    monkeypatch.setattr(zero, "_train", run)
    monkeypatch.setattr(zero, "_MODULES", {})
    status, rows = zero_rows(tmp_path)
    assert status == 1
    assert rows["test_vit/zero1/fp32/reference"]["passed"]
    assert "adapter differs by 1.00e-01" in rows["test_vit/zero3/fp32/reference"]["failed"][0]


@pytest.mark.slow
def test_zero_trains_through_the_launcher(tmp_path):
    pytest.importorskip("deepspeed")
    status, rows = zero_rows(tmp_path)
    assert status == 0
    for row in rows.values():
        assert row["passed"] and row["steps"] == 20 and row["losses"][-1] < row["losses"][0]
