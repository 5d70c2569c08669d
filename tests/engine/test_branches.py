"""What runs within a branch that is one operator, and what around it; whose packs are looked at."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
from torch import nn

import fastpeft
from fastpeft.engine import packed
from fastpeft.engine.branches import Inside
from fastpeft.engine.extensions import Adapters, Bottleneck, SingleAdapter
from fastpeft.engine.post_norm import block_run
from fastpeft.engine.stack import packs_of
from fastpeft.methods.base import Method
from tests.models.mplug.tiny import make
from tests.tiny import vit


@dataclass(frozen=True)
class Replacing(Method):
    """Adapters of one kind, on their own or under a location."""

    name: ClassVar[str] = ""
    mode: str = "serial"
    skip: bool = False
    single: bool = False

    def attach(self, model):
        for block in model.blocks:
            kind = SingleAdapter if self.single else Bottleneck
            inner = kind(block.dim, 8, "relu", bias=True, skip=self.skip)
            block.attach("tried", inner if self.single else Adapters(self.mode, {"ffn": inner}))


@pytest.mark.parametrize(
    "method, within",
    [
        (Replacing(skip=True), True),
        (Replacing(skip=True, single=True), True),
        # What a backend computes of a serial adapter is f + A(f), and these say A(f).
        (Replacing(), False),
        (Replacing(single=True), False),
        (Replacing("parallel"), True),
        (Replacing("parallel", skip=True), False),
    ],
    ids=str,
)
def test_which_adapters_run_within_a_branch(method, within):
    run = block_run(fastpeft.patch(vit(), method).blocks[0])
    inside = Inside(run, "ffn", False)
    assert inside.all == within
    native = SimpleNamespace(Adapter=lambda *args: args)
    assert (inside.adapter(native) is not None) == bool(inside.factors) == within


@pytest.mark.parametrize("method, known", [(Replacing(skip=True), True), (Replacing(), False)], ids=str)
def test_which_adapters_run_behind_a_packed_product(method, known):
    model = make()
    fastpeft.patch(model, method)
    run = block_run(model.text_encoder.encoder.layer[0])
    found = packed._adapter(run, "ffn")
    assert (found is not None) == known and packed._adapter(run, "attn") == ("", None)


def names(host):
    return [packs.name for packs in packs_of(host)]


def test_packs_are_those_of_the_hosts_own_blocks():
    model = fastpeft.patch(make())
    for name, module in model.named_modules():
        if "fastpeft_block" in module.__dict__:
            module.fastpeft_block.packs = SimpleNamespace(name=name, bytes=1, verify=lambda: None)
    tower = model.visual_encoder
    assert names(tower) == ["visual_encoder.blocks.0", "visual_encoder.blocks.1"]
    assert len(names(model)) == 8 and not any(name.startswith("visual") for name in names(model))
    assert fastpeft.summary(model).bytes["packed"] == 10, "each once"
    # Wherever the blocks are by then.
    tower.blocks[1] = nn.Sequential(tower.blocks[1])
    assert names(tower) == ["visual_encoder.blocks.0", "visual_encoder.blocks.1"]
    tower.blocks = tower.blocks[:1]
    assert names(tower) == ["visual_encoder.blocks.0"]
    model.visual_encoder = nn.Identity()
    assert len(names(model)) == 8


def test_prompts_of_a_block_that_was_wrapped_since():
    model = fastpeft.patch(make(), fastpeft.PromptTuning(2))
    prompts = model._prompts("text")
    assert prompts is model.text_encoder.encoder.layer[0].prompt_tuning and model._prompts("fusion") is None
    model.text_encoder.encoder.layer[0] = nn.Sequential(model.text_encoder.encoder.layer[0])
    assert model._prompts("text") is prompts
