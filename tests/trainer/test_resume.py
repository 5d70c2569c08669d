"""A run killed at any moment continues, and ends with the bytes of the run that was not."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastpeft.trainer import checkpoint
from fastpeft.trainer.loop import Loop
from tests.thinned import thinned
from tests.trainer.conftest import ROOT

METHOD = [{"name": "vpt", "length": 3, "dropout": 0.2}, {"name": "lora", "rank": 2, "dropout": 0.1}]
# Two accumulated micro-batches, an epoch of six steps with a smaller last one, checkpoints out of step with epochs.
TRAIN = {
    "epochs": 8,
    "grad_accumulation": 2,
    "checkpoint_every": "4 steps",
    "schedule_by": "step",
    "lr": {},
    "base_lr": 0.05,
}


def adapter_bytes(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


class Killed(BaseException):
    """Stands for a kill where a process of its own would cost seconds: nothing catches it."""


def interrupt_after(monkeypatch, steps: int) -> None:
    """Stop the run in this process just before a step."""
    step = Loop._step

    def limited(self, batches, logs):
        if self.position.global_step == steps:
            raise Killed
        step(self, batches, logs)

    monkeypatch.setattr(Loop, "_step", limited)


@pytest.mark.parametrize(
    ("optimizer", "precision"), thinned([("adamw", "bf16"), ("adamw", "fp32"), ("sgd", "fp16"), ("sgd", "bf16")], 4)
)
def test_resuming_anywhere_gives_the_same_bytes(train, write_config, tmp_path, monkeypatch, optimizer, precision):
    options = TRAIN | {"optimizer": optimizer, "precision": precision, "epochs": 4}
    data = {"augment": "flip"}
    assert train(write_config(method=METHOD, data=data, train=options, out=str(tmp_path / "whole")))[0] == 0
    config = write_config(method=METHOD, data=data, train=options, out=str(tmp_path / "cut"))
    for steps in (3, 7, 17, 18):
        with monkeypatch.context() as patch:
            interrupt_after(patch, steps)
            with pytest.raises(Killed):
                train(config)
    code, out, _ = train(config)
    assert code == 0 and "resuming  after step 16" in out
    assert adapter_bytes(tmp_path / "cut") == adapter_bytes(tmp_path / "whole")


@pytest.mark.parametrize("zero", thinned([1, 2, 3], 3, first=2))
def test_resuming_with_partitioned_state_gives_the_same_bytes(train, write_config, tmp_path, monkeypatch, zero):
    options = TRAIN | {"zero": zero, "epochs": 3}
    assert train(write_config(train=options, out=str(tmp_path / "whole")))[0] == 0
    config = write_config(train=options, out=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 6)
        with pytest.raises(Killed):
            train(config)
    assert train(config)[0] == 0
    assert adapter_bytes(tmp_path / "cut") == adapter_bytes(tmp_path / "whole")


def test_running_statistics_and_head_dropout_are_resumed(train, write_config, tmp_path, monkeypatch):
    options = TRAIN | {"grad_accumulation": 1, "epochs": 3}
    method = {"name": "mlp_head", "k": 2}
    assert train(write_config(method=method, train=options, out=str(tmp_path / "whole")))[0] == 0
    config = write_config(method=method, train=options, out=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 9)
        with pytest.raises(Killed):
            train(config)
    assert train(config)[0] == 0
    assert adapter_bytes(tmp_path / "cut") == adapter_bytes(tmp_path / "whole")


def test_the_best_epoch_survives_an_interruption(train, write_config, tmp_path, monkeypatch):
    measure = Loop.measure

    def falling(self, split):
        found = measure(self, split)
        return found | {f"{split}_accuracy": 1 / self.position.epoch}

    monkeypatch.setattr(Loop, "measure", falling)
    assert train(write_config(train=TRAIN | {"epochs": 3}, out=str(tmp_path / "whole")))[0] == 0
    config = write_config(train=TRAIN | {"epochs": 3}, out=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 15)
        with pytest.raises(Killed):
            train(config)
    assert train(config)[0] == 0
    assert adapter_bytes(tmp_path / "cut") == adapter_bytes(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_checkpoint_is_left_out_with_a_warning(train, write_config, tmp_path, monkeypatch, damage):
    options = TRAIN | {"epochs": 3}
    assert train(write_config(train=options, out=str(tmp_path / "whole")))[0] == 0
    config = write_config(train=options, out=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 14)
        with pytest.raises(Killed):
            train(config)
    newest = tmp_path / "cut" / "checkpoints" / "step-00000012"
    tensors = newest / "tensors.safetensors"
    content = bytearray(tensors.read_bytes())
    if damage == "truncate":
        tensors.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[-7] ^= 1
        tensors.write_bytes(content)
    else:
        (newest / "state.json").unlink()
    code, out, err = train(config)
    assert code == 0 and "resuming  after step 8" in out
    assert "warning: damaged checkpoint removed" in err and "step-00000012" in err
    assert adapter_bytes(tmp_path / "cut") == adapter_bytes(tmp_path / "whole")


def test_a_kill_during_an_evaluation_loses_no_step(train, write_config, tmp_path, monkeypatch):
    options = TRAIN | {"epochs": 3, "checkpoint_every": "1 epoch"}
    assert train(write_config(train=options, out=str(tmp_path / "whole")))[0] == 0
    config = write_config(train=options, out=str(tmp_path / "cut"))
    measure = Loop.measure
    for epoch in (2, 3):

        def killed(self, split, at=epoch):
            if self.position.epoch == at:
                raise Killed
            return measure(self, split)

        with monkeypatch.context() as patch:
            patch.setattr(Loop, "measure", killed)
            with pytest.raises(Killed):
                train(config)
        assert newest_step(tmp_path / "cut") == 6 * epoch
    code, out, _ = train(config)
    assert code == 0 and "resuming  after step 18" in out
    assert adapter_bytes(tmp_path / "cut") == adapter_bytes(tmp_path / "whole")
    one, two = (json.loads((tmp_path / name / "results.json").read_text())["history"] for name in ("whole", "cut"))
    assert one == two


def test_an_evaluation_is_not_repeated_once_it_is_kept(train, write_config, monkeypatch):
    measure, epochs = Loop.measure, []

    def counted(self, split):
        epochs.append((self.position.epoch, split))
        return measure(self, split)

    monkeypatch.setattr(Loop, "measure", counted)
    config = write_config(train=TRAIN | {"epochs": 3, "checkpoint_every": "1 epoch"})
    with monkeypatch.context() as patch:
        interrupt_after(patch, 13)
        with pytest.raises(Killed):
            train(config)
    assert train(config)[0] == 0
    assert [epoch for epoch, split in epochs if split == "val"] == [1, 2, 3]


def test_a_format_that_the_hardware_chooses_anew_is_told(train, write_config, tmp_path, monkeypatch):
    from fastpeft.trainer import precision

    config = write_config(train=TRAIN | {"precision": "auto", "epochs": 3})
    with monkeypatch.context() as patch:
        patch.setattr(precision, "_cpu_flags", lambda: {"amx_bf16"})
        interrupt_after(patch, 9)
        with pytest.raises(Killed):
            train(config)
    folder = tmp_path / "out" / "checkpoints"
    tensors, state = checkpoint.load(folder / "step-00000008")
    assert state["precision"] == "bf16"
    monkeypatch.setattr(precision, "_cpu_flags", set)
    code, _, err = train(config)
    assert code == 0 and "begun in bf16, continued in fp32" in err
    # Older checkpoints do not say.
    del state["precision"]
    (tmp_path / "out" / "results.json").unlink()
    shutil.rmtree(folder)
    checkpoint.save(folder, 8, tensors, state)
    code, out, err = train(config)
    assert code == 0 and "resuming  after step 8" in out and "begun in" not in err


def test_a_checkpoint_that_was_being_replaced_is_the_runs(train, write_config, tmp_path, monkeypatch):
    config = write_config(train=TRAIN | {"epochs": 3})
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(Killed):
            train(config)
    folder = tmp_path / "out" / "checkpoints"
    (folder / "step-00000004").rename(folder / ".replaced-step-00000004")
    code, _, err = train(config, "train.seed=7")
    assert code == 2 and "another configuration" in err
    code, out, _ = train(config)
    assert code == 0 and "resuming  after step 4" in out


@pytest.mark.parametrize(
    ("seen", "expected"),
    [("whole", None), ("damaged", "checksum"), ("other", "of another run"), ("none", "No such file")],
)
def test_another_rank_reads_what_the_first_one_chose_or_says_why_not(tmp_path, seen, expected):
    folder = tmp_path / "checkpoints"
    state = {"position": {"global_step": 5, "best": float("nan")}}
    for step in (4, 5):
        path = checkpoint.save(folder, step, {"a": torch.ones(3)}, state)
    if seen == "damaged":
        (path / "tensors.safetensors").write_bytes(b"")
    elif seen == "other":
        checkpoint.save(folder, 5, {"a": torch.ones(3)}, {"position": {"global_step": 5, "best": 1.0}})
    elif seen == "none":
        shutil.rmtree(path)
    loop = Loop.__new__(Loop)
    loop.folder = SimpleNamespace(checkpoints=folder)
    if expected is None:
        assert loop._tensors_of(json.loads(json.dumps(state)))["a"].tolist() == [1, 1, 1]
        return
    with pytest.raises(checkpoint.CheckpointError, match=f"step-00000005.*{expected}"):
        loop._tensors_of(state)
    assert path.exists() == (seen != "none")


def test_an_interruption_before_the_results_are_written_only_repeats_the_end(
    train, write_config, tmp_path, monkeypatch
):
    from fastpeft.trainer import results

    config = write_config(train=TRAIN | {"epochs": 2})
    with monkeypatch.context() as patch:
        patch.setattr(results, "draw", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            train(config)
    before = adapter_bytes(tmp_path / "out")
    code, out, _ = train(config)
    assert code == 0 and "resuming  after step 12" in out and "test accuracy" in out
    assert adapter_bytes(tmp_path / "out") == before


@pytest.mark.parametrize("times", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_sigkill_at_random_moments(train, command, environment, write_config, tmp_path, times):
    """A process of its own, killed while it starts, computes, evaluates or writes, and started again."""
    # An epoch is six steps.
    options = TRAIN | {"epochs": 6 * times, "checkpoint_every": "3 steps", "warmup_epochs": 0}
    assert train(write_config(method=METHOD, train=options, out=str(tmp_path / "whole")))[0] == 0
    config = write_config(method=METHOD, train=options, out=str(tmp_path / "cut"))
    arguments = [sys.executable, str(ROOT / "fastpeft" / "train.py"), "--config", str(config)]
    # Other moments in every run of the test; the message of a failure says which.
    draw = random.SystemRandom()
    moments = [(draw.randrange(30 * k, 30 * (k + 1)), draw.uniform(0, 0.05)) for k in range(times)]
    kills = 0
    for step, delay in moments:
        process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and newest_step(tmp_path / "cut") < step:
            time.sleep(0.002)
        time.sleep(delay)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= max(1, times - 1), f"too many runs ended before they were killed: {moments}"
    last = command(config)
    assert last.returncode == 0, last.stderr
    assert adapter_bytes(tmp_path / "cut") == adapter_bytes(tmp_path / "whole"), moments


def newest_step(out: Path) -> int:
    """The step of the newest finished checkpoint, 0 without one."""
    return max((int(path.name.partition("-")[2]) for path in (out / "checkpoints").glob("step-*")), default=0)


def test_a_folder_whose_owner_cannot_be_read_is_not_taken_over(train, write_config, tmp_path):
    config = write_config(train={"epochs": 2})
    assert train(config)[0] == 0
    (tmp_path / "out" / "config.json").write_text("{")
    before = (tmp_path / "out" / "adapter" / "adapter_model.safetensors").read_bytes()
    code, _, err = train(config)
    assert code == 2 and "config.json cannot be read" in err and len(err.strip().splitlines()) == 1
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_a_checkpoint_of_another_version_is_one_line(train, write_config, tmp_path):
    config = write_config(train={"epochs": 2})
    assert train(config)[0] == 0
    folder = tmp_path / "out"
    (folder / "results.json").unlink()
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    tensors, state = checkpoint.load(newest)
    state["position"]["minute"] = state["position"].pop("epoch")
    checkpoint.save(folder / "checkpoints", int(newest.name[5:]), tensors, state)
    code, _, err = train(config)
    assert code == 1 and "another version" in err and "epoch, minute" in err and "--fresh" in err
