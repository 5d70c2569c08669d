"""The configurations in `configs/` are whole, and those of the mPLUG study say what its table says."""

from __future__ import annotations

import pytest

from fastpeft.config import load_config
from tests.trainer.conftest import ROOT

FILES = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_file_describes_a_run(path):
    assert load_config(path).out


@pytest.mark.parametrize(
    "method, captions", [("prompt", 3e-4), ("prefix", 3e-4), ("lora", 5e-6), ("serial", 1e-6), ("parallel", 1e-6)]
)
def test_rates_and_lengths_are_the_studys(method, captions):
    coco = load_config(ROOT / "configs" / "mplug" / f"coco_caption_{method}.yaml")
    vqa = load_config(ROOT / "configs" / "mplug" / f"vqa_{method}.yaml")
    for config in (coco, vqa):
        assert (config.train.batch_size, config.train.weight_decay, config.model.image_size) == (256, 0.05, 256)
    assert (coco.train.steps, coco.train.warmup_steps, coco.train.warmup_lr, coco.train.min_lr) == (4000, 400, 0, 0)
    assert (vqa.train.epochs, vqa.train.warmup_steps, vqa.train.warmup_by_ratio) == (10, 800, True)
    assert (vqa.train.warmup_lr, vqa.train.min_lr) == (1e-6, 1e-6)
    assert (coco.train.base_lr, vqa.train.base_lr) == (captions, 3e-4)
    assert (coco.data.prompt, vqa.data.template, vqa.eval.beams) == ("a picture of", "study", 5)
