"""A task of a few synthetic images and a model of two narrow blocks: a run takes a second or two."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def make_images(root: Path, split: str, per_class: int, seed: int) -> None:
    """Three classes that differ in their mean colour."""
    draw = np.random.default_rng(seed)
    for label, name in enumerate(("blue", "green", "red")):
        folder = root / split / name
        folder.mkdir(parents=True)
        for index in range(per_class):
            pixels = draw.integers(0, 120, (32, 32, 3))
            pixels[..., 2 - label] += 110
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:03}.png")


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    make_images(root, "train", 15, seed=1)
    make_images(root, "val", 4, seed=2)
    make_images(root, "test", 5, seed=3)
    return root


def write_run(images: Path, folder: Path, **changes) -> Path:
    """Write a configuration file, given the sections that differ from the defaults here, and return its path."""
    tree = {
        "model": {"name": "test_vit", "weights": "random", "image_size": 32},
        "data": {"name": "folder", "root": str(images)},
        "method": {"name": "vpt", "length": 3},
        "train": {
            "epochs": 3,
            "batch_size": 8,
            "optimizer": "adamw",
            "lr": {"vpt": 1e-2, "head": 1e-2},
            "warmup_epochs": 1,
            "precision": "fp32",
        },
        "out": str(folder / "out"),
    }
    for section, values in changes.items():
        replace = section in ("method", "out")
        tree[section] = values if replace else tree[section] | values
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def write_config(images, tmp_path):
    """`write_run` into the test's own folder."""
    return functools.partial(write_run, images, tmp_path)


@pytest.fixture
def environment() -> dict[str, str]:
    """Of a command line: one thread, no launcher's variables."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return kept | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


@pytest.fixture
def command(environment):
    """Run the training command to its end, in a process of its own."""

    def run(config: Path, *arguments: str, launcher: tuple[str, ...] = (sys.executable,)):
        return subprocess.run(
            [*launcher, str(ROOT / "fastpeft" / "train.py"), "--config", str(config), *arguments],
            env=environment,
            cwd=config.parent,
            capture_output=True,
            text=True,
            timeout=240,
        )

    return run


@pytest.fixture
def train(capfd, monkeypatch):
    """Run the training command in this process, which draws only if asked; returns exit code, output and errors."""
    from fastpeft.trainer import results

    drawn = results.draw

    def run(config: Path, *arguments: str, draws: bool = False):
        from fastpeft.train import main

        with monkeypatch.context() as patch:
            if not draws and results.draw is drawn:
                patch.setattr(results, "draw", lambda *_: None)
            code = main(["--config", str(config), *arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return run
