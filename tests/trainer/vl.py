"""Coloured squares with captions and questions, in the formats of COCO and VQAv2, and a run of a tiny mPLUG."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
SIDES = ("left", "right")
_WORDS = "a picture of square on the left right red green blue question answer what color is where it : ? . , yes no"
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *_WORDS.split()]


def make(root: Path) -> None:
    """Write images, `captions.json`, `vqa_<split>.json` and `vocab.txt`."""
    draw = np.random.default_rng(5)
    images, questions, number = [], {"train": [], "val": [], "test": []}, 0
    folder = root / "train2014_img"
    folder.mkdir(parents=True)
    for split, count in (("train", 4), ("val", 1), ("test", 1)):
        for color, rgb in COLORS.items():
            for side in SIDES:
                for _ in range(count):
                    pixels = draw.integers(90, 130, (32, 32, 3))
                    first = 2 if side == "left" else 18
                    pixels[9:23, first : first + 12] = rgb
                    name = f"{split}_{number:03}.png"
                    Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
                    raw = [f"A {color} square on the {side}.", f"A square on the {side}, {color}."]
                    sentences = [{"raw": text} for text in raw]
                    images.append({"filename": name, "filepath": "train2014", "split": split, "sentences": sentences})
                    path = f"train2014_img/{name}"
                    for text, answer, other in (
                        ("What color is the square?", color, "red"),
                        ("Where is the square?", side, "it is " + side),
                    ):
                        answers = [answer] * 8 + [other] * 2
                        question = {
                            "dataset": "vqa",
                            "image": path,
                            "question": text,
                            "question_id": 10 + len(questions[split]),
                        }
                        questions[split].append(question | {"answer": answers})
                    number += 1
    (root / "captions.json").write_text(json.dumps({"images": images}))
    for split, entries in questions.items():
        (root / f"vqa_{split}.json").write_text(json.dumps(entries))
    (root / "vocab.txt").write_text("\n".join(VOCAB) + "\n")


def config(root: Path, kind: str = "captions", **changes) -> dict:
    """A run of a tiny mPLUG, given what differs from the defaults here, section by section."""
    sizes = {
        "patch_size": 16,
        "image_width": 48,
        "image_depth": 1,
        "image_heads": 3,
        "width": 32,
        "num_heads": 4,
        "intermediate": 64,
        "max_positions": 40,
        "text_layers": 1,
        "fusion_layers": 4,
        "stride": 2,
        "decoder_layers": 2,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }
    captions = {name: str(root / "captions.json") for name in ("train", "val", "test")}
    questions = {name: str(root / f"vqa_{name}.json") for name in ("train", "val", "test")}
    tree = {
        "model": {"name": "mplug", "image_size": 32, "vocab": str(root / "vocab.txt"), "sizes": sizes},
        "data": {"name": "coco_caption", "root": str(root), **captions}
        if kind == "captions"
        else {"name": "vqa", "root": str(root), **questions},
        "method": {"name": "lora", "rank": 2, "targets": ["q", "k"]},
        "train": {"batch_size": 8, "base_lr": 1e-2, "steps": 4, "warmup_steps": 1, "precision": "fp32"},
        "eval": {"beams": 2, "min_length": 1, "max_length": 6, "batch_size": 4},
    }
    if kind == "captions":
        tree["eval"] |= {"tokenizer": "python", "metrics": ["cider", "bleu_4"]}
    for section, values in changes.items():
        if section in ("method", "out"):
            tree[section] = values
        else:
            tree[section] = {key: value for key, value in (tree[section] | values).items() if value is not None}
    return tree
