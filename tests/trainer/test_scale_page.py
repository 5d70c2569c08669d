"""The arithmetic of docs/scale.md: what its table says of the configurations for stage 3 is what their models have."""

from __future__ import annotations

from itertools import dropwhile, takewhile

import pytest
import torch

import fastpeft
from fastpeft import methods
from fastpeft._compat import import_timm
from fastpeft.config import load_config
from fastpeft.engine.block import BlockState
from fastpeft.models.mplug import MPlug, MPlugConfig
from fastpeft.trainer.mplug.root import Root, readers_of
from tests.trainer.conftest import ROOT

RANKS = 8
# Of a trained parameter: master, gradient, and the optimizer's two moments, in fp32.
STATE = 16
COLUMNS = {
    "ViT-H/14, VPT p = 50": "vit_huge_vpt_zero3.yaml",
    "ViT-H/14, LoRA r = 8 (q, v)": "vit_huge_lora_zero3.yaml",
    "mPLUG-large, LoRA r = 8 (q, k)": "mplug/large_coco_caption_lora_zero3.yaml",
}
SLOW = pytest.mark.slow
PAGE = (ROOT / "docs" / "scale.md").read_text()


def table() -> dict[str, dict[str, str]]:
    """The page's first table, those behind it being of what was measured: column -> row -> cell."""
    lines = dropwhile(lambda line: not line.startswith("|"), PAGE.splitlines())
    lines = [line.strip().strip("|").split("|") for line in takewhile(lambda line: line.startswith("|"), lines)]
    (_, *names), _, *rows = [[cell.strip() for cell in line] for line in lines]
    return {name: {row[0]: row[number] for row in rows} for number, name in enumerate(names, 1)}


def mega(count: float, digits: int = 0) -> str:
    return f"{count / 1e6:,.{digits}f}"


def giga(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def units_of(model) -> dict[str, int]:
    """Weights that are gathered at once, by what they are."""
    blocks = [m for m in model.modules() if isinstance(m.__dict__.get("fastpeft_block"), BlockState)]
    found = {"a block": max(sum(p.numel() for p in block.parameters()) for block in blocks)}
    if isinstance(model, MPlug):
        readers = readers_of(Root(model))
        found["output layer and vocabulary"] = sum(p.numel() for p in readers[0][1])
        assert max(sum(p.numel() for p in weights) for _, weights in readers) == found["output layer and vocabulary"]
    return found


# Models of this size take seconds to describe, without a weight.
@pytest.mark.parametrize("name", [next(iter(COLUMNS)), *(pytest.param(n, marks=SLOW) for n in list(COLUMNS)[1:])])
def test_a_column_is_its_configurations(name):
    config = load_config(ROOT / "configs" / COLUMNS[name])
    assert config.train.zero == 3 and config.train.precision == "bf16"
    with torch.device("meta"):
        if config.model.name == "mplug_large":
            model = MPlug(MPlugConfig.large(config.model.image_size))
        else:
            model = import_timm().create_model(config.model.name, img_size=config.model.image_size, num_classes=0)
        weights = sum(p.numel() for p in model.parameters())
        fastpeft.patch(model, methods.from_dict(config.method))
    trained = sum(p.numel() for p in fastpeft.trainable_parameters(model))
    unit, largest = max(units_of(model).items(), key=lambda found: found[1])
    share, gathered, state = 2 * weights / RANKS, 2 * 2 * largest, STATE * trained
    rows = config.train.batch_size // RANKS
    if isinstance(model, MPlug):
        shapes = [(rows, model.config.image_tokens, width) for width in (model.config.image_width, model.config.width)]
    else:
        shapes = [(rows, model.pos_embed.shape[1], model.embed_dim)]
    said = [" x ".join(map(str, shape)) for shape in shapes]
    places = said[0] if len(said) == 1 else f"{said[0]} in the tower, {said[1]} behind it"
    sizes = [f"{mega(2 * a * b * c)} MB" for a, b, c in shapes]
    assert table()[name] == {
        "weights, head aside": f"{mega(weights, 1)}M",
        "whole, bf16": f"{mega(2 * weights)} MB",
        "a rank's share": f"{mega(share)} MB",
        "largest unit": f"{unit}, {mega(largest, 1)}M: {mega(2 * largest)} MB",
        "gathered at most": f"{mega(gathered)} MB",
        "trained, head aside": f"{mega(trained, 1)}M: {mega(state / RANKS, 1)} MB a rank",
        "weights and state in all": giga(share + gathered + state / RANKS),
        "the same at stage 0": giga(2 * weights + state),
        f"rows of a GPU's part of the batch ({rows})": places,
        "one set of these rows, bf16": " and ".join(sizes),
    }


def test_every_configuration_for_stage_3_has_a_column():
    files = sorted((ROOT / "configs").rglob("*zero3.yaml"))
    assert sorted(ROOT / "configs" / path for path in COLUMNS.values()) == files
    assert list(table()) == list(COLUMNS)


def test_what_the_text_says_of_activations():
    text = " ".join(PAGE.split())
    one, depth = 2 * 32 * 257 * 1280, 32
    assert f"{giga(16 * one)} a block and {16 * one * depth / 1e9:.1f} GB for ViT-H's 32" in text
    prompts = 2 * 32 * 50 * 1280
    assert f"have 2 x {mega(prompts, 1)} MB in a block, {giga(2 * prompts * depth)} in all" in text
    assert f"its 10.8 GB become {16 * depth * (one + prompts) / 1e9:.1f}" in text
    memory = 2 * 32 * 577 * 768
    assert f"12 x 2 x {mega(memory)} MB = {giga(24 * memory)}" in text
