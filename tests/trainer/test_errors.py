"""What cannot be run says so in one line before anything is trained, and what goes wrong names the step."""

from __future__ import annotations

import time

import pytest
import torch

from fastpeft.errors import FastPEFTError
from fastpeft.trainer.workload import Workload


def one_line(err: str) -> str:
    lines = [line for line in err.strip().splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.epochz=3"], "command line: train.epochz: unknown key; did you mean 'epochs'?"),
        (["model.name=vit_smal_patch16_224"], "run.yaml: model: 'vit_smal_patch16_224' is not a timm model"),
        (["model.image_size=33"], "run.yaml: model: image_size 33"),
        (["model.weights=/absent.npz"], "run.yaml: model: "),
        (["model.num_classes=2"], "run.yaml: model.num_classes: labels of 'folder' go up to 2, outside a head of 2"),
        (["data.root=/absent"], "run.yaml: data: "),
        (["method.depth=[1, 99]"], "run.yaml: method: "),
        (["method={name: lora, targets: [x]}"], "method"),
        (["train.cuda_graph=true"], "train.cuda_graph: records steps on one GPU, and this run is on the CPU"),
        (["train.cuda_graph=true", "train.zero=1"], "train.cuda_graph needs zero 0"),
        (["model.backend=magic"], "model.backend"),
        (["train.lr.lora=1"], "run.yaml: train.lr.lora: no such parameter group; this run trains: head, vpt"),
        (["train.lr={vpt: 1}"], "run.yaml: train.lr: no rate for group 'head'"),
        (["train.grad_accumulation=3"], "run.yaml: train.batch_size: 8 images cannot be dealt evenly"),
        (
            ["method={name: mlp_head, k: 2}", "train.batch_size=4", "train.lr={head: 1, mlp_head: 1}"],
            "run.yaml: train.batch_size: the head's batch normalisation needs two images",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_run(train, write_config, tmp_path, overrides, expected):
    code, _, err = train(write_config(), *overrides)
    assert code == 2
    assert expected in one_line(err)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_the_command_exits_with_2_and_no_traceback(command, write_config):
    done = command(write_config(), "method.lenght=3")
    assert done.returncode == 2
    assert "method.lenght: unknown field of method 'vpt'; did you mean 'length'?" in one_line(done.stderr)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named(train, write_config, images, tmp_path, workers):
    import shutil

    shutil.copytree(images, tmp_path / "images")
    broken = tmp_path / "images" / "train" / "green" / "004.png"
    broken.write_bytes(broken.read_bytes()[:60])
    config = write_config(data={"root": str(tmp_path / "images"), "workers": workers})
    code, _, err = train(config)
    assert code != 0 and str(broken) in one_line(err)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(train, write_config, tmp_path, monkeypatch):
    forward = Workload.forward
    calls = []

    def poisoned(self, inputs):
        logits = forward(self, inputs)
        if self.model.training:
            calls.append(1)
            if len(calls) == 9:
                return logits * float("nan")
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(Workload, "forward", poisoned)
        config = write_config()
        code, _, err = train(config)
    assert code == 1
    message = one_line(err)
    assert "step 9 (epoch 2): the loss is nan" in message and "checkpoints" in message
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000006"]
    # What made it diverge was not part of the run, so the run can go on.
    code, out, _ = train(config)
    assert code == 0 and "resuming  after step 6" in out


def test_weights_that_are_not_finite_are_never_checkpointed(train, write_config, tmp_path, monkeypatch):
    from fastpeft.trainer.stepper import Stepper

    step = Stepper.step
    calls = []

    def poisoned(self):
        step(self)
        calls.append(1)
        if len(calls) == 12:
            next(iter(self.named.values())).data.fill_(torch.inf)

    monkeypatch.setattr(Stepper, "step", poisoned)
    code, _, err = train(write_config())
    assert code == 1 and "step 12: param/" in one_line(err)
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000006"]


def test_a_full_disk_is_one_line(train, write_config, tmp_path, monkeypatch):
    from safetensors import SafetensorError, torch

    save_file, calls = torch.save_file, []

    def full(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save_file(*arguments)

    config = write_config()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save_file", full)
        code, _, err = train(config)
    message = one_line(err)
    assert code == 1 and "step-00000012: cannot be written" in message and "No space left" in message
    assert "the same command continues from the last checkpoint" in message
    code, out, _ = train(config)
    assert code == 0 and "resuming  after step 12" in out


@pytest.fixture
def second(monkeypatch) -> list[float]:
    """This process says that it is the second of two ranks, and notes how long it waits instead of waiting."""
    waited: list[float] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def raising(error: BaseException):
    def run(*_):
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (FastPEFTError("7.jpg: cannot be read"), 1, "7.jpg: cannot be read"),
        (OSError(5, "Input/output error"), 1, "Input/output error; the same command continues"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_rank_that_fails_alone_says_so(train, write_config, monkeypatch, second, error, code, expected):
    from fastpeft.trainer import session

    monkeypatch.setattr(session, "run", raising(error))
    found, _, err = train(write_config())
    assert found == code and one_line(err).startswith("error: rank 1: ") and expected in err
    # Long enough for the launcher to end this rank if the first one has told the same.
    assert second and second[0] > 5


@pytest.mark.parametrize(
    ("error", "told"), [(FastPEFTError("7.jpg: cannot be read"), True), (KeyboardInterrupt(), False)]
)
def test_an_interruption_of_the_wait_is_no_traceback(train, write_config, monkeypatch, second, error, told):
    from fastpeft.trainer import session

    monkeypatch.setattr(session, "run", raising(error))
    monkeypatch.setattr(time, "sleep", raising(KeyboardInterrupt()))
    _, _, err = train(write_config())
    assert ("7.jpg" in err) == told and "Traceback" not in err


def test_a_rank_that_is_gone_is_one_line_to_the_others(train, write_config, monkeypatch):
    from fastpeft.trainer import session

    gone = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:6049.")
    monkeypatch.setattr(session, "run", raising(gone))
    code, _, err = train(write_config())
    assert code == 1 and "another rank has ended" in one_line(err)
    monkeypatch.setattr(session, "run", raising(RuntimeError("mat1 and mat2 shapes cannot be multiplied")))
    with pytest.raises(RuntimeError, match="mat1"):
        train(write_config())


def test_a_mistake_that_is_mended_is_not_held_against_the_folder(train, write_config):
    config = write_config()
    assert train(config, "method.depth=[1, 99]")[0] == 2
    assert train(config)[0] == 0


def test_two_runs_do_not_share_a_folder(train, write_config, tmp_path, monkeypatch):
    from fastpeft.trainer.folder import RunFolder

    take = RunFolder.take
    monkeypatch.setattr(RunFolder, "take", lambda self: take(self, patience=0.1))
    other = RunFolder(tmp_path / "out")
    other.take()
    code, _, err = train(write_config())
    assert code == 2 and "another run is training into" in one_line(err)
    other.release()
    assert train(write_config())[0] == 0
