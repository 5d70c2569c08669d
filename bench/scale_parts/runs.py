"""Runs of the training command, alone and on ranks of this machine, and what is compared of them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.scale_parts.data import make_captions, make_folder
from fastpeft.models.mplug import MPlug, MPlugConfig

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
BATCH = 4
# Of a step's loss, |a - b| / |b|: sums of twenty steps in fp32, rounded in another order.
BOUND = 1e-4
# How far a loss has to move, ten times as far: where nothing is learnt, wrong gradients show in nothing.
LEAST_LEARNT = 1e-3

METHODS = {
    "vpt": {"name": "vpt", "length": 10, "dropout": 0.0},
    "lora": {"name": "lora", "rank": 8, "targets": ["q", "k"]},
    "prefix": {"name": "prefix", "length": 8, "form": "hidden"},
}
# Of mPLUG, base and tiny. Through random weights the gradients of prefixes are small.
_RATES = {"lora": (0.5, 0.5), "prefix": (10.0, 0.5)}
_TINY = {
    "patch_size": 16,
    "image_width": 48,
    "image_depth": 2,
    "image_heads": 3,
    "width": 32,
    "num_heads": 4,
    "intermediate": 64,
    "text_layers": 1,
    "fusion_layers": 4,
    "stride": 2,
    "decoder_layers": 2,
}


def config(kind: str, method: str, folder: Path, out: Path, *, tiny: bool, **train: Any) -> dict[str, Any]:
    """A run of twenty steps in fp32 without dropout, on images of 64 pixels.

    Args:
        kind: "vit" or "mplug".
        method: One of `METHODS`.
        folder: Where its data are made.
        out: Where it leaves its results.
        tiny: A model of a few blocks, for tests of the benchmark.
        **train: Of the section of that name.
    """
    common = {"batch_size": BATCH, "optimizer": "sgd", "precision": "fp32"}
    if kind == "vit":
        # Four images, so that an epoch is a step and has a line of its own in the history.
        return {
            "model": {"name": "test_vit" if tiny else "vit_base_patch16_224", "weights": "random", "image_size": 64},
            "data": {"name": "folder", "root": str(make_folder(folder / "images", BATCH))},
            "method": METHODS[method],
            "train": {
                **common,
                "epochs": STEPS,
                # Faster, and of four images nothing is left to learn: of a loss near zero a difference is rounding.
                "base_lr": 0.5 if tiny else 5e-4,
                "warmup_epochs": 1,
                "eval_every": 0,
                "checkpoint_every": "5 steps",
                **train,
            },
            "out": str(out),
        }
    # Four again: every step sees all of them, so that its loss is another only by what was learnt.
    captions = str(make_captions(folder / "captions", BATCH))
    sizes = {"dropout": 0.0, "attention_dropout": 0.0, **(_TINY if tiny else {})}
    model = {"name": "mplug" if tiny else "mplug_base", "image_size": 64, "sizes": sizes}
    if tiny:
        model["checkpoint"] = str(_start(folder / "tiny.safetensors", sizes))
    return {
        "model": model,
        "data": {"name": "coco_caption", "root": str(folder / "captions"), "train": captions, "test": captions},
        "method": METHODS[method],
        "train": {
            **common,
            "steps": STEPS,
            "base_lr": _RATES[method][tiny],
            "eval_every": 1,
            "checkpoint_every": "5 steps",
            **train,
        },
        # A token of one image after each step, which makes the step's loss a line of the history.
        "eval": {"beams": 1, "min_length": 0, "max_length": 1, "tokenizer": "python", "metrics": ["cider"]},
        "out": str(out),
    }


def _start(path: Path, sizes: Mapping[str, Any]) -> Path:
    """Weights of a tiny mPLUG so large that its methods have gradients; random ones as usual vanish at such widths."""
    if not path.exists():
        torch.manual_seed(0)
        model = MPlug.from_config(MPlugConfig(image_size=64, **sizes))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not name.startswith("visual_encoder"):
                    parameter.add_(0.15 * torch.randn_like(parameter))
        path.parent.mkdir(parents=True, exist_ok=True)
        model.save(path)
    return path


def run(tree: Mapping[str, Any], ranks: int, *, seconds: float = 1800.0, saying: str = "") -> dict[str, Any]:
    """Run the command to its end and return its results.

    Args:
        tree: A configuration, as from `config`.
        ranks: How many processes.
        seconds: After which it is given up.
        saying: What it has to say on the way.

    Raises:
        RuntimeError: It failed, and the message is the end of what it said; or it did not say what it should.
    """
    out = Path(tree["out"])
    path = out.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    # JSON is YAML, too.
    path.write_text(json.dumps(tree))
    said = ended(command(path, ranks), path.stem, seconds)
    if saying not in said:
        raise RuntimeError(f"{path.stem}: did not say {saying!r}: {said.strip()[-1500:]}")
    return json.loads((out / "results.json").read_text())


def ended(words: list[str], name: str, seconds: float) -> str:
    """Run a command line to its end and return its output.

    Raises:
        RuntimeError: It failed, or was not done in time; then nothing of it goes on.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(words, stdout=out, stderr=err, text=True, env=environment(), cwd=ROOT)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{name}: not done after {seconds:.0f} s") from None
        finally:
            if process.poll() is None:
                kill(process)
        out.seek(0)
        err.seek(0)
        said, failed = out.read(), err.read()
    if status:
        raise RuntimeError(f"{name}: {(failed or said).strip()[-1500:]}")
    return said


def kill(process: subprocess.Popen) -> None:
    """End a command and all that it started at once, as when a machine is taken away."""
    command = psutil.Process(process.pid)
    family = [*command.children(recursive=True), command]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    # The command itself is its parent's to wait for.
    psutil.wait_procs(family[:-1], timeout=60)
    process.wait()


def command(path: Path, ranks: int) -> list[str]:
    """The command line of a configuration."""
    script = [str(ROOT / "fastpeft" / "train.py"), "--config", str(path)]
    return [*(launcher(ranks) if ranks > 1 else [sys.executable]), *script]


def launcher(ranks: int) -> list[str]:
    """DeepSpeed's launcher on a port that is free, up to the script."""
    found = shutil.which("deepspeed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise RuntimeError("DeepSpeed's launcher is not installed; pip install 'fastpeft[train]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [found, "--num_accelerators", str(ranks), "--master_port", str(port)]


def environment() -> dict[str, str]:
    """Of a command: this checkout, one thread a rank, the CPU."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return kept | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}


def losses(results: Mapping[str, Any]) -> list[float]:
    """The loss of each step."""
    return [entry["train_loss"] for entry in results["history"]]


def largest_difference(first: list[float], second: list[float]) -> float:
    """The largest relative difference of two runs' losses; infinite where they have not as many steps."""
    if len(first) != len(second) or not all(map(math.isfinite, [*first, *second])):
        return math.inf
    return max(abs(a - b) / abs(b) for a, b in zip(first, second, strict=True))


def learnt(losses: list[float]) -> float:
    """The largest relative change of a step's loss since the first; all of a run's steps see the same samples."""
    if not losses or not all(map(math.isfinite, losses)):
        return 0.0
    return max(abs(loss - losses[0]) / losses[0] for loss in losses)
