"""Hooks on inner modules see what they see in the unpatched model, and may change it."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from timm.models.vision_transformer import Block
from torch import nn

import fastpeft
from tests.dropin.both import assert_same, assert_same_state, assert_same_steps, pair, step, tensors
from tests.tiny import images, patched, vit

PATHS = [
    "patch_embed",
    "blocks",
    "blocks.0",
    "blocks.2",
    "blocks.0.norm1",
    "blocks.1.attn",
    "blocks.2.attn",
    "blocks.2.attn.qkv",
    "blocks.2.attn.proj",
    "blocks.2.attn.attn_drop",
    "blocks.1.mlp",
    "blocks.2.mlp",
    "blocks.2.mlp.fc1",
    "blocks.2.mlp.act",
    "blocks.2.drop_path2",
    "norm",
    "head_drop",
    "head",
]


class Record:
    """What hooks of every kind were called with."""

    def __init__(self):
        self.seen = []

    def note(self, kind, module, *values):
        self.seen.append((kind, type(module).__name__, [t.detach().clone() for t in tensors(list(values))]))

    def watch(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda m, a, k: self.note("pre", m, a, k), with_kwargs=True)
        module.register_forward_hook(lambda m, a, k, out: self.note("forward", m, a, k, out), with_kwargs=True)
        module.register_full_backward_pre_hook(lambda m, grad: self.note("backward pre", m, *grad))
        module.register_full_backward_hook(lambda m, gi, go: self.note("backward", m, *gi, *go))

    def assert_same(self, other: Record) -> None:
        assert [entry[:2] for entry in self.seen] == [entry[:2] for entry in other.seen]
        for (kind, name, wanted), (_, _, found) in zip(self.seen, other.seen, strict=True):
            assert len(wanted) == len(found), (kind, name)
            for expected, actual in zip(wanted, found, strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, msg=lambda m, k=kind: f"{k}: {m}")


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # on the patches' layer, whose input is the image
@pytest.mark.parametrize("before", [True, False], ids=["hooked_then_patched", "patched_then_hooked"])
@pytest.mark.parametrize("path", PATHS)
def test_hooks_see_the_same(path, before):
    records = Record(), Record()
    plain = vit(dtype=torch.float64, drop_path_rate=0.3)
    other = vit(dtype=torch.float64, drop_path_rate=0.3)
    if before:
        records[1].watch(other.get_submodule(path))
    fastpeft.patch(other)
    if not before:
        records[1].watch(other.get_submodule(path))
    records[0].watch(plain.get_submodule(path))
    x = images(dtype=torch.float64)
    for call in (lambda m, x: m(x), lambda m, x: m.forward_features(x), lambda m, x: m.forward_intermediates(x)):
        assert_same_steps(plain, other, x, call)
    records[0].assert_same(records[1])
    assert records[0].seen or path == "blocks.2.attn.attn_drop"  # fused attention takes its rate and never calls it


def test_hooks_that_change_what_they_see():
    for path in ("blocks", "blocks.2", "blocks.1.attn", "blocks.1.mlp.fc1", "norm"):
        plain, other = pair(vit(dtype=torch.float64))
        for model in (plain, other):
            module = model.get_submodule(path)
            module.register_forward_hook(lambda m, a, out: out.roll(1, dims=1) * 1.5)
            module.register_forward_pre_hook(lambda m, a: (a[0] * 0.5,))
        assert_same_steps(plain, other, images(dtype=torch.float64))


def test_hooks_of_every_module():
    plain, other = pair(vit(dtype=torch.float64))
    records = []
    for model in (plain, other):
        record = Record()
        handle = nn.modules.module.register_module_forward_hook(lambda m, a, out, r=record: r.note("any", m, a, out))
        try:
            model(images(dtype=torch.float64))
        finally:
            handle.remove()
        records.append(record)
    records[0].assert_same(records[1])


def test_hooked_blocks_are_listed_until_the_hook_goes():
    model = fastpeft.patch(vit())
    handle = model.blocks[1].attn.proj.register_forward_hook(lambda *args: None)
    assert [path for path, _ in fastpeft.summary(model).left_alone] == ["blocks.1", "blocks.1.attn.proj"]
    handle.remove()
    assert fastpeft.summary(model).left_alone == []


@pytest.mark.parametrize("method", [fastpeft.VPT(4), fastpeft.LoRA(2), fastpeft.PrefixTuning(3)])
def test_hooks_beside_a_method_are_given_the_module_itself(method):
    model = patched(method, dtype=torch.float64).eval()
    x = images(dtype=torch.float64)
    expected = step(model, x)
    for path in ("blocks.1", "blocks.1.attn", "blocks.1.mlp", "blocks.1.mlp.fc1"):

        def keep(module, args, output):
            module.kept = output

        module = model.get_submodule(path)
        handle = module.register_forward_hook(keep)
        assert_same(expected, step(model, x))
        assert module.kept.shape[0] == len(x)
        assert "forward" not in module.__dict__
        handle.remove()
        del module.kept


class Doubling(ModelHook):
    """An accelerate hook that shows that it ran."""

    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return (args[0] * 2, *args[1:]), kwargs

    def post_forward(self, module, output):
        return output * 0.5


INNER = [
    "blocks.0.norm1",
    "blocks.1.attn",
    "blocks.2.attn.qkv",
    "blocks.2.attn.proj",
    "blocks.1.mlp",
    "blocks.2.mlp.fc2",
]


@pytest.mark.parametrize("path", [*INNER, "norm", "head", "blocks"])
@pytest.mark.parametrize("before", [True, False], ids=["hooked_then_patched", "patched_then_hooked"])
def test_accelerate_hooks_on_inner_modules(path, before):
    plain, other = vit(dtype=torch.float64), vit(dtype=torch.float64)
    hooks = Doubling(), Doubling()
    add_hook_to_module(plain.get_submodule(path), hooks[0])
    if before:
        add_hook_to_module(other.get_submodule(path), hooks[1])
    fastpeft.patch(other)
    if not before:
        add_hook_to_module(other.get_submodule(path), hooks[1])
    assert_same_steps(plain, other, images(dtype=torch.float64))
    assert hooks[0].calls == hooks[1].calls > 0
    if path in INNER:
        assert path[:8] in dict(fastpeft.summary(other).left_alone)
    remove_hook_from_module(other.get_submodule(path))
    remove_hook_from_module(plain.get_submodule(path))
    assert fastpeft.summary(other).left_alone == []
    assert_same_steps(plain, other, images(dtype=torch.float64))


def test_accelerate_hooks_on_a_block():
    plain, other = pair(vit(dtype=torch.float64))
    for model in (plain, other):
        add_hook_to_module(model.blocks[2], Doubling())
    assert_same_steps(plain, other, images(dtype=torch.float64))
    with pytest.raises(fastpeft.FastPEFTError, match=r"blocks\.2 was wrapped after it was patched"):
        fastpeft.unpatch(other)
    remove_hook_from_module(other.blocks[2])
    remove_hook_from_module(plain.blocks[2])
    fastpeft.unpatch(other)
    assert type(other.blocks[2]) is Block
    assert_same_steps(plain, other, images(dtype=torch.float64))


def test_a_block_that_was_hooked_by_accelerate_before_is_left_alone():
    model = vit(dtype=torch.float64)
    add_hook_to_module(model.blocks[1], Doubling())
    with pytest.raises(fastpeft.UnsupportedModelError, match=r"blocks\.1: its forward was replaced"):
        fastpeft.patch(model)
    plain = vit(dtype=torch.float64)
    add_hook_to_module(plain.blocks[1], Doubling())
    assert_same_steps(plain, fastpeft.patch(model, strict=False), images(dtype=torch.float64))


def test_accelerate_hooks_on_the_whole_model():
    for method in (None, fastpeft.VPT(4)):
        model, other = vit(dtype=torch.float64), vit(dtype=torch.float64)
        hook = Doubling()
        add_hook_to_module(model, hook)
        fastpeft.patch(model, method)
        fastpeft.patch(other, method)
        other.load_state_dict(model.state_dict())
        x = images(dtype=torch.float64)
        torch.testing.assert_close(model.eval()(x), other.eval()(2 * x) / 2)
        assert hook.calls == 1


def test_a_methods_container_with_a_replaced_forward_is_an_error():
    model = fastpeft.patch(vit(), fastpeft.LoRA(2))
    add_hook_to_module(model.blocks[1].attn, Doubling())
    with pytest.raises(fastpeft.UnsupportedModelError, match="the forward of a block's Attention was replaced"):
        model(images())


def test_a_removed_accelerate_hook_leaves_nothing_behind():
    model = vit(dtype=torch.float64)
    for path in ("blocks.1", "blocks.1.attn.qkv"):
        add_hook_to_module(model.get_submodule(path), Doubling())
        remove_hook_from_module(model.get_submodule(path))
    plain, other = pair(model)
    assert fastpeft.summary(other).left_alone == []
    assert_same_steps(plain, other, images(dtype=torch.float64))
    assert_same_state(plain, fastpeft.unpatch(other))
