"""Two ranks on the CPU, through DeepSpeed's launcher and torch's."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.thinned import EXHAUSTIVE
from tests.trainer.conftest import ROOT

# Beside the interpreter: an environment that is not activated is not on the path.
LAUNCHER = shutil.which("deepspeed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
pytestmark = pytest.mark.skipif(LAUNCHER is None, reason="DeepSpeed's launcher is not installed")


def launcher(ranks: int) -> tuple[str, ...]:
    """The command line up to the script, on a port that is free."""
    return (LAUNCHER, "--num_accelerators", str(ranks), "--master_port", free_port())


def torchrun(ranks: int) -> tuple[str, ...]:
    """The same with torch's own launcher, which starts faster and makes no difference to the ranks."""
    return (sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}")


def free_port() -> str:
    """Nobody's at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "zero, precision, rtol",
    [
        pytest.param(0, "fp32", 1e-3, marks=EXHAUSTIVE),
        pytest.param(1, "fp32", 1e-3, marks=pytest.mark.slow),
        pytest.param(1, "fp16", 2e-2, marks=EXHAUSTIVE),
        pytest.param(2, "fp32", 1e-3, marks=pytest.mark.slow),
        (3, "fp32", 1e-3),
    ],
)
def test_two_ranks_train_what_one_does(command, train, write_config, tmp_path, zero, precision, rtol):
    # 45 training images: the last step of an epoch has five, dealt three and two. 15 test images: eight and seven.
    method = {"name": "vpt", "length": 3, "dropout": 0.0}
    alone = write_config(method=method, train={"precision": precision}, out=str(tmp_path / "alone"))
    assert train(alone)[0] == 0
    config = write_config(method=method, train={"precision": precision, "zero": zero}, out=str(tmp_path / "two"))
    done = command(config, launcher=(launcher if zero == 3 else torchrun)(2))
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("alone", "two"))
    assert two["ranks"] == 2
    for first, second in zip(one["history"], two["history"], strict=True):
        assert second["train_loss"] == pytest.approx(first["train_loss"], rel=rtol)
        assert second["val_accuracy"] == first["val_accuracy"]
    plain = adapter(tmp_path / "alone")
    for name, tensor in adapter(tmp_path / "two").items():
        torch.testing.assert_close(tensor, plain[name], rtol=rtol, atol=rtol / 10)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [pytest.param(1, marks=pytest.mark.exhaustive), 3])
def test_two_ranks_resume_to_the_same_bytes(command, write_config, environment, tmp_path, zero):
    options = {"zero": zero, "epochs": 6, "checkpoint_every": "2 steps", "precision": "bf16"}
    whole = write_config(train=options, out=str(tmp_path / "whole"))
    assert command(whole, launcher=torchrun(2)).returncode == 0
    config = write_config(train=options, out=str(tmp_path / "cut"))
    script = [str(ROOT / "fastpeft" / "train.py"), "--config", str(config)]
    process = subprocess.Popen(
        [*launcher(2), *script], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    checkpoints = tmp_path / "cut" / "checkpoints"
    wait_for(lambda: checkpoints.is_dir() and any(checkpoints.glob("step-*")))
    ranks = [
        child for child in psutil.Process(process.pid).children(recursive=True) if "train.py" in child.cmdline()[2]
    ]
    # The launcher alone is killed, as a user's kill -9 would: its ranks must notice and end.
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert ranks
    wait_for(lambda: not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks))
    done = command(config, launcher=torchrun(2))
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout
    first, second = ((tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert first.read_bytes() == second.read_bytes()


def test_an_error_is_told_once_and_becomes_the_exit_code(command, write_config):
    done = command(write_config(), "method.length=0", launcher=launcher(2))
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
