"""What training moves and what it leaves alone, to the bit; and which modules sleep meanwhile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastpeft
from tests.tiny import METHODS, VARIANTS, fits, images, labels, vit

# Gradients that are identically zero, by a part of the tensor's name, with the reason.
NEVER = {
    ("adapter-released", ".adapter.down.weight"): "Up is zero, so nothing reaches Down; Down(u) is zero, so Up stays",
    ("adapter-released", ".adapter.down.bias"): "Up is zero and stays zero",
    ("adapter-released", ".adapter.up.weight"): "its input GELU(Down(u)) is zero and stays zero",
}
# Zero in exact arithmetic: what is added to all keys moves all logits of a query alike. Rounding may move it or not.
ROUNDING_ONLY = "attn.k_norm.bias"
# Zero in the first step only: the factor behind it starts at zero.
FIRST_STEP = (".lora.", ".adapter.down.", "_adapter.attn.down.", "_adapter.ffn.down.")


def train(model, steps, lr=0.1, variant="class_token"):
    optimizer = torch.optim.SGD(fastpeft.trainable_parameters(model), lr=lr)
    history = []
    for seed in range(steps):
        optimizer.zero_grad()
        dtype = next(model.parameters()).dtype
        F.cross_entropy(model(images(variant, seed=seed, dtype=dtype)), labels()).backward()
        history.append({n: p.grad.abs().max().item() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    return history


_TWO_STEPS = ("class_token", "no_class_token", "qk_norm", "map_pool", "distilled", "layer_scale")


@pytest.mark.parametrize("variant, method", [(v, m) for v in _TWO_STEPS for m in METHODS if fits(METHODS[m], v)])
def test_two_steps_move_what_is_trained_and_nothing_else(variant, method):
    # In float64 also a small gradient moves a parameter by more than its last bit.
    model = fastpeft.patch(vit(variant), METHODS[method]).train().double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    statistics = {name for name in before if name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    train(model, 2, variant=variant)
    for name, tensor in model.state_dict().items():
        still = [reason for (of, part), reason in NEVER.items() if of == method and part in name]
        if still:
            assert torch.equal(tensor, before[name]), f"{name} moved, but: {still[0]}"
        elif ROUNDING_ONLY not in name:
            moved = not torch.equal(tensor, before[name])
            assert moved == (name in trained | statistics), f"{name} {'moved' if moved else 'did not move'}"


@pytest.mark.parametrize("method", ["lora-all", "adapter", "serial", "parallel", "serial-ffn-bias"])
def test_factors_before_a_zero_move_from_the_second_step_on(method):
    model = fastpeft.patch(vit(), METHODS[method]).train()
    first, second = train(model, 2)
    late = {name for name in first if any(part in name for part in FIRST_STEP) and not name.endswith(".B")}
    assert late
    for name in first:
        assert (first[name] == 0.0) == (name in late), name
        assert second[name] > 0.0, name


def test_the_released_adapter_trains_one_vector_a_block():
    model = fastpeft.patch(vit(), METHODS["adapter-released"]).train()
    for gradients in train(model, 3):
        moving = {name for name, size in gradients.items() if size > 0.0}
        assert moving == {f"blocks.{i}.adapter.up.bias" for i in range(3)} | {"head.weight", "head.bias"}


@pytest.mark.parametrize("method", ["vpt-deep", "lora-all", "adapter", "bitfit", "full"])
def test_a_frozen_head_stays(method):
    model = fastpeft.patch(vit(), METHODS[method], train_head=False)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and not [name for name in trained if name.startswith("head")]
    before = model.head.weight.clone()
    train(model, 1)
    assert torch.equal(model.head.weight, before)


DROPPING = {"proj_drop_rate": 0.5, "attn_drop_rate": 0.5, "drop_path_rate": 0.5, "pos_drop_rate": 0.5, "drop_rate": 0.5}


@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_backbone_sleeps_while_training(method):
    parts = {part.name for part in METHODS[method].parts()}
    model = fastpeft.patch(vit(**DROPPING, patch_drop_rate=0.25), METHODS[method]).train()
    assert model.training
    awake = {
        n for n, m in model.named_modules() if m.training and isinstance(m, nn.Dropout) and not n.startswith("head.")
    }
    if parts == {"full"}:
        assert "blocks.0.attn.proj_drop" in awake and "head_drop" in awake
        assert not torch.equal(model(images()), model(images()))
        return
    assert not awake
    for block in model.blocks:
        for name in block.fastpeft_block.extensions:
            assert all(m.training for m in block.get_submodule(name).modules())
        assert not block.drop_path1.training and not block.mlp.training
    assert model.head.training
    assert not any(m.training for m in model.eval().modules())


def test_sleeping_dropout_does_not_change_a_training_forward():
    for method in (fastpeft.LoRA(2), fastpeft.Partial(2), fastpeft.VPT(4, dropout=0.0) + fastpeft.Full()):
        model = fastpeft.patch(vit(**DROPPING), method)
        x = images()
        torch.testing.assert_close(model.train()(x), model.eval()(x))


def test_a_plain_patch_leaves_the_backbones_dropout_on():
    model = fastpeft.patch(vit(**DROPPING)).train()
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("variant", [v for v in VARIANTS if fits(METHODS["lora-all"], v)])
def test_every_group_has_a_name(variant):
    method = fastpeft.LoRA(2) + fastpeft.VPT(3) + fastpeft.BitFit()
    model = fastpeft.patch(vit(variant), method)
    groups = fastpeft.parameter_groups(model)
    assert set(groups) == {"head", "lora", "vpt", "backbone"}
    names = [name for group in groups.values() for name, _ in group]
    assert sorted(names) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert len({id(p) for p in fastpeft.trainable_parameters(model)}) == len(names)


def test_shared_prompts_are_trained_once():
    model = fastpeft.patch(vit(), fastpeft.VPT(3, share="inter", dropout=0.0))
    assert len(fastpeft.parameter_groups(model)["vpt"]) == 1
    assert model.blocks[0].vpt.prompts is model.blocks[2].vpt.prompts
