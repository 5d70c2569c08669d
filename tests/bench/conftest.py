"""Data that the benchmarks' tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def draw(folder: Path) -> Path:
    """Two task folders of 24 images in four classes, below `folder`."""
    from PIL import Image

    root = folder / "vtab"
    for folder in ("eurosat", "cifar"):
        (root / folder / "images").mkdir(parents=True)
        lines = []
        for i in range(24):
            pixels = torch.randint(0, 60, (16, 16, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
            pixels[..., i % 3] += 40 * (i % 4)
            Image.fromarray(pixels.numpy()).save(root / folder / "images" / f"{i}.png")
            lines.append(f"images/{i}.png {i % 4}\n")
        (root / folder / "classes.txt").write_text("a\nb\nc\nd\n")
        for name, part in (("train800", lines[:12]), ("val200", lines[12:16]), ("train800val200", lines[:16])):
            (root / folder / f"{name}.txt").write_text("".join(part))
        (root / folder / "test.txt").write_text("".join(lines[16:]))
    return root


@pytest.fixture(scope="session")
def vtab_of():
    """Makes the task folders below a folder."""
    return draw


@pytest.fixture
def vtab(tmp_path):
    """The task folders."""
    return draw(tmp_path)


@pytest.fixture
def no_worker(monkeypatch):
    """A run of pytest inside this one is no worker of it."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
