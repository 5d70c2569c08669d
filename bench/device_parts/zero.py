"""Part `zero`: twenty steps of the trainer through DeepSpeed's launcher at ZeRO stages 1 and 3, on one device.

Images and configuration are made here, since nothing else may be on the machine. A row is right if the run ends, took
its steps with finite losses, and trained the same adapter as a run without ZeRO.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from bench.device_parts.rows import Results, Row, Unavailable, describe
from bench.device_parts.settings import VIT_B, Settings

_ROOT = Path(__file__).resolve().parents[2]
_STAGES = (1, 3)
_CLASSES, _EPOCHS, _STEPS_OF_AN_EPOCH = 4, 4, 5
_SECONDS = 180
# Of the trained tensors, ||with - without|| / ||without||, after twenty steps.
_BOUND = {"fp32": 1e-3, "bf16": 3e-2}
# Distributions by the modules that the trainer, DeepSpeed and what they need import.
_MODULES = {
    "deepspeed": "deepspeed",
    "einops": "einops",
    "hjson": "hjson",
    "msgpack": "msgpack",
    "psutil": "psutil",
    "py-cpuinfo": "cpuinfo",
    "pydantic": "pydantic",
    "pydantic-core": "pydantic_core",
    "annotated-types": "annotated_types",
    "typing-inspection": "typing_inspection",
    "tqdm": "tqdm",
    "PyYAML": "yaml",
    "rich": "rich",
    "tensorboard": "tensorboard",
    "matplotlib": "matplotlib",
    "pillow": "PIL",
    "safetensors": "safetensors",
    "timm": "timm",
}


def rows(settings: Settings) -> Iterator[Row]:
    """Stages, formats and backends; in little fp32 alone."""
    name = "test_vit" if settings.tiny else settings.shape(VIT_B).model
    for precision in ("fp32",) if settings.tiny else ("bf16", "fp32"):
        for backend in settings.backends:
            for stage in _STAGES:
                key = f"{name}/zero{stage}/{precision}/{backend}"
                yield key, lambda s=stage, p=precision, b=backend: _row(settings, name, s, p, b)


def _row(settings: Settings, model: str, stage: int, precision: str, backend: str) -> dict[str, object]:
    missing = [name for name, module in _MODULES.items() if importlib.util.find_spec(module) is None]
    if missing:
        be, its = ("is", "its wheel") if len(missing) == 1 else ("are", "their wheels")
        raise Unavailable(f"{', '.join(missing)} {be} not installed; put {its} under wheels/")
    if backend != "reference" and not settings.cuda:
        raise Unavailable(f"{backend} needs a GPU in the trainer")
    plain, _ = _train(settings, model, 0, precision, backend)
    trained, found = _train(settings, model, stage, precision, backend)
    error = max(float((trained[name] - plain[name]).norm() / plain[name].norm()) for name in plain)
    losses = [entry["train_loss"] for entry in found["history"]]
    wrong = [] if error <= _BOUND[precision] else [f"adapter differs by {error:.2e}, bound {_BOUND[precision]:.0e}"]
    wrong += [] if all(map(math.isfinite, losses)) else [f"losses {losses}"]
    wrong += [] if len(losses) == _EPOCHS else [f"{len(losses)} of {_EPOCHS} epochs"]
    return {
        "passed": not wrong,
        "failed": wrong,
        "steps": _EPOCHS * _STEPS_OF_AN_EPOCH,
        "losses": losses,
        "relative_error": error,
        "bound": _BOUND[precision],
        "ms_per_image": found["ms_per_image"],
        "peak_memory_mb": found["peak_memory_mb"],
        "precision": found["precision"],
        "versions": found["versions"],
    }


@functools.lru_cache(maxsize=4)
def _train(
    settings: Settings, model: str, stage: int, precision: str, backend: str
) -> tuple[dict[str, torch.Tensor], dict]:
    """A run's trained tensors and results; what all stages are compared with is run once."""
    from safetensors.torch import load_file

    folder = Path(_folder().name)
    size, batch = (32, 4) if settings.tiny else (224, 32)
    images = _images(folder / "images", size, batch * _STEPS_OF_AN_EPOCH)
    out = folder / f"{stage}-{precision}-{backend}"
    tree = {
        "model": {"name": model, "weights": "random", "image_size": size, "backend": backend},
        "data": {"name": "folder", "root": str(images)},
        "method": {"name": "vpt", "length": 10},
        "train": {
            "epochs": _EPOCHS,
            "batch_size": batch,
            "base_lr": 0.5,
            "warmup_epochs": 1,
            "precision": precision,
            "zero": stage,
            "eval_every": 0,
            "checkpoint_every": f"{_EPOCHS} epochs",
        },
        "out": str(out),
    }
    # JSON is YAML, too.
    config = folder / f"{out.name}.yaml"
    config.write_text(json.dumps(tree))
    _run(settings, config)
    return load_file(out / "adapter" / "adapter_model.safetensors"), json.loads((out / "results.json").read_text())


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="fastpeft-zero-")


@functools.cache
def _images(root: Path, size: int, count: int) -> Path:
    """Noise in a class's colour, as a folder of images: root/split/class/number.png."""
    from PIL import Image

    draw = random.Random(0)
    for split, total in (("train", count), ("test", 2 * _CLASSES)):
        for index in range(total):
            label = index % _CLASSES
            colour = [60 + 130 * (label >> channel & 1) for channel in range(3)]
            noise = draw.randbytes(size * size * 3)
            pixels = bytes(min(255, colour[i % 3] + (value >> 2)) for i, value in enumerate(noise))
            place = root / split / f"class{label}"
            place.mkdir(parents=True, exist_ok=True)
            Image.frombytes("RGB", (size, size), pixels).save(place / f"{index:04}.png")
    return root


def _run(settings: Settings, config: Path) -> None:
    launcher = [sys.executable, "-c", "from deepspeed.launcher.runner import main; main()"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    if not settings.cuda:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [*launcher, "--num_accelerators", "1", "--master_port", str(port)]
    command += [str(_ROOT / "fastpeft" / "train.py"), "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, env=environment, cwd=config.parent)
    if done.returncode:
        sys.stderr.write(done.stdout + done.stderr)
        told = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        raise RuntimeError(f"the trainer ended with status {done.returncode}: {told[0] if told else 'see the log'}")


def table(rows: Mapping[str, Mapping], results: Results) -> str:
    """One line a run."""
    lines = []
    for key, row in rows.items():
        if "losses" not in row:
            lines.append(f"{key:<56} {describe(row)}")
            continue
        memory = ", ".join(f"{value:,.0f} MB {where}" for where, value in row["peak_memory_mb"].items())
        lines.append(
            f"{key:<56} {describe(row)}: {row['steps']} steps, loss {row['losses'][0]:.3f} to {row['losses'][-1]:.3f}, "
            f"{row['ms_per_image']:.2f} ms/image, {memory}; off the run without ZeRO by {row['relative_error']:.1e}"
        )
    return "\n".join(lines)
