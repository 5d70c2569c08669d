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
import torch.nn.functional as F
from safetensors.torch import load_file

from fastpeft.config import load_config
from fastpeft.trainer.task import prepare
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


@pytest.mark.slow
def test_a_split_with_fewer_images_than_ranks_is_encoded(command, write_config, tmp_path):
    config = write_config(method={"name": "linear"}, data={"test_size": 1}, train={"lr": {"head": 0.01}})
    done = command(config, launcher=torchrun(2))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["cached_features"] and found["test_accuracy"]["last"] in (0.0, 1.0)


def test_running_statistics_that_are_scored_are_those_that_are_saved(command, write_config, tmp_path):
    rates = {"lr": {}, "base_lr": 0.1, "select": "last", "epochs": 2, "checkpoint_every": "3 steps"}
    config = write_config(method={"name": "mlp_head", "k": 2}, train=rates)
    done = command(config, launcher=torchrun(2))
    assert done.returncode == 0, done.stderr
    task, model = prepare(load_config(str(config)), "test")
    saved = adapter(tmp_path / "out")
    assert any(name.endswith("running_var") for name in saved)
    assert not model.load_state_dict(saved, strict=False).unexpected_keys
    images, labels = zip(*(task.splits.val[index] for index in range(len(task.splits.val))), strict=True)
    with torch.no_grad():
        loss = F.cross_entropy(model.eval()(torch.stack(images)), torch.tensor(labels))
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["history"][-1]["val_loss"] == pytest.approx(float(loss), rel=1e-4)


def test_an_error_is_told_once_and_becomes_the_exit_code(command, write_config):
    done = command(write_config(), "method.length=0", launcher=launcher(2))
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1


# Run as a rank: the training command, whose second rank finds every checkpoint damaged.
_DAMAGED = """
import os, sys
from fastpeft.trainer import checkpoint
if os.environ["RANK"] == "1":
    checkpoint._digest_file = lambda path: "another"
from fastpeft.train import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_ranks_go_on_from_one_checkpoint_or_not_at_all(train, write_config, environment, tmp_path, monkeypatch):
    from tests.trainer.test_resume import Killed, interrupt_after

    config = write_config(train={"checkpoint_every": "2 steps"})
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(Killed):
            train(config)
    script = tmp_path / "damaged.py"
    script.write_text(_DAMAGED)
    done = subprocess.run(
        [*torchrun(2), str(script), "--config", str(config)],
        env=environment | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode != 0
    assert "error: rank 1: the first rank goes on from" in done.stderr and "step-00000004" in done.stderr
    kept = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000004"]


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)
