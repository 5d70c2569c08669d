"""`patch`, `unpatch` and `refresh`: what they change, what they put back, what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import FastPEFTError, MethodError, UnsupportedModelError
from fastpeft.engine.adopt import original_class
from tests.tiny import FEW, METHODS, VARIANTS, images, patched, timm, vit


def snapshot(model):
    """Everything of a model that a user could notice."""
    return {
        "classes": {name: type(module) for name, module in model.named_modules()},
        "objects": {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
    }


def assert_equal(found, expected, *, but=()):
    assert found["state"].keys() == expected["state"].keys()
    for name, tensor in expected["state"].items():
        assert torch.equal(found["state"][name], tensor), name
    for key in expected.keys() - {"state", *but}:
        assert found[key] == expected[key], key


def mixed(variant="class_token", **options):
    """A model in a state of its own: some parameters frozen, some modules in evaluation mode."""
    model = vit(variant, **options).train()
    model.blocks[0].requires_grad_(False)
    model.blocks[1].mlp.fc1.eval()
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_plain_patch_changes_nothing_but_classes(variant):
    model = mixed(variant) if variant != "gated_mlp" else vit(variant)
    x = images(variant)
    before, expected = snapshot(model), model(x)
    assert fastpeft.patch(model) is model
    assert_equal(snapshot(model), before, but=("classes", "attributes"))
    torch.testing.assert_close(model(x), expected)
    assert isinstance(model, type(vit(variant))) and type(model).__name__ == type(vit(variant)).__name__
    assert fastpeft.unpatch(model) is model
    assert_equal(snapshot(model), before, but=("training",))


@pytest.mark.parametrize("method", METHODS)
def test_unpatching_gives_the_model_back(method):
    model = vit()
    before, expected = snapshot(model), model.eval()(images())
    model.train()
    fastpeft.patch(model, METHODS[method])
    if set(model.state_dict()) != set(before["state"]):
        changed = snapshot(model)
        with pytest.raises(MethodError, match=r"unpatching would lose .*fastpeft.save.*discard=True") as caught:
            fastpeft.unpatch(model)
        # Merging would leave the head that stands above a deep one's layers, and lose them.
        assert ("fastpeft.merge" in str(caught.value)) == ("mlp_head" not in str(caught.value))
        assert_equal(snapshot(model), changed)
    fastpeft.unpatch(model, discard=True)
    assert_equal(snapshot(model), before)
    assert torch.equal(model.eval()(images()), expected)


def test_patching_is_idempotent():
    model = fastpeft.patch(vit(), METHODS["vpt+lora"])
    before = snapshot(model)
    assert fastpeft.patch(model) is model
    assert fastpeft.patch(model, METHODS["vpt+lora"]) is model
    assert_equal(snapshot(model), before)


def test_a_method_may_follow_a_plain_patch_and_be_replaced():
    model = fastpeft.patch(fastpeft.patch(vit()), METHODS["lora-q-v"])
    fastpeft.unpatch(model, discard=True)
    fastpeft.patch(model, METHODS["vpt-deep"])
    assert "blocks.0.vpt.prompts" in model.state_dict() and "blocks.0.lora.q.A" not in model.state_dict()


def test_unpatching_a_model_that_is_not_patched():
    model = mixed()
    before = snapshot(model)
    assert_equal(snapshot(fastpeft.unpatch(model)), before, but=("training",))


def test_a_second_method_suggests_the_sum():
    model = fastpeft.patch(vit(), METHODS["vpt-deep"])
    before = snapshot(model)
    with pytest.raises(MethodError, match=r"already carries VPT; .*sum, such as VPT \+ BitFit"):
        fastpeft.patch(model, fastpeft.BitFit())
    with pytest.raises(MethodError, match=r"VPT \+ VPT|already carries VPT"):
        fastpeft.patch(model, fastpeft.VPT(9))
    with pytest.raises(MethodError, match="already carries VPT"):
        fastpeft.patch(model, METHODS["vpt-deep"], train_head=False)
    assert_equal(snapshot(model), before)


FAILING = {
    "unknown target in the second part": fastpeft.VPT(4) + fastpeft.LoRA(2, targets=("q", "nothing")),
    "too deep, after others": METHODS["lora-all"] + fastpeft.MLPHead(2) + fastpeft.VPT(2, depth=(1, 9)),
    "too many blocks": fastpeft.BitFit() + fastpeft.Partial(7),
    "bad shape": fastpeft.SerialAdapter(4) + fastpeft.VPT(4, init=torch.zeros(3, 3)),
}


@pytest.mark.parametrize("patched_before", [False, True])
@pytest.mark.parametrize("method", FAILING)
def test_a_method_that_fails_midway_leaves_the_model_as_it_was(method, patched_before):
    model = mixed()
    if patched_before:
        fastpeft.patch(model)
    before = snapshot(model)
    with pytest.raises(MethodError):
        fastpeft.patch(model, FAILING[method])
    assert_equal(snapshot(model), before)
    fastpeft.patch(model, METHODS["vpt+lora"])  # and it can still be patched


def test_an_unexpected_failure_leaves_the_model_as_it_was(monkeypatch):
    from fastpeft.engine.view import BlockView

    attach = BlockView.attach

    def fail_at_the_last(self, *args):
        if self.index == 2:
            raise KeyboardInterrupt
        attach(self, *args)

    model = mixed()
    before = snapshot(model)
    monkeypatch.setattr(BlockView, "attach", fail_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        fastpeft.patch(model, METHODS["vpt-deep"])
    assert_equal(snapshot(model), before)


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda: nn.Linear(3, 3), r"no transformer that fastpeft knows in Linear; it knows timm's VisionTransformer"),
        (lambda: timm.create_model("resnet18"), r"no transformer that fastpeft knows in ResNet"),
        (
            lambda: vit(block_fn=timm.models.vision_transformer.ResPostBlock),
            r"blocks\.0: a ResPostBlock is not timm's pre-norm Block; blocks\.1: .*strict=False",
        ),
        (lambda: vit(attn_layer="diff"), r"its attention is a DiffAttention"),
    ],
)
def test_unsupported_models_are_named(model, message):
    model = model()
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError, match=message):
        fastpeft.patch(model)
    assert_equal(snapshot(model), before)


def test_blocks_that_the_engine_cannot_run_are_left_alone_and_listed():
    plain = vit(dtype=torch.float64).eval()
    plain.blocks[1] = timm.models.vision_transformer.ParallelScalingBlock(32, 2).double().eval()
    model = fastpeft.unpatch(vit(dtype=torch.float64)).eval()
    model.blocks[1] = plain.blocks[1]
    fastpeft.patch(model, strict=False)
    assert [path for path, _ in fastpeft.summary(model).left_alone] == ["blocks.1"]
    assert type(model.blocks[1]) is timm.models.vision_transformer.ParallelScalingBlock
    x = images(dtype=torch.float64)
    torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(model.forward_features(x), plain.forward_features(x))
    torch.testing.assert_close(model.forward_intermediates(x), plain.forward_intermediates(x))
    before = snapshot(model)
    with pytest.raises(
        MethodError, match=r"VPT needs every block, but blocks\.1 is left alone: a ParallelScalingBlock"
    ):
        fastpeft.patch(model, fastpeft.VPT(4))
    assert_equal(snapshot(model), before)


def test_a_transformer_inside_another_module():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.neck = nn.Linear(5, 2)
            self.tower = vit(dtype=torch.float32)

        def forward(self, x):
            return self.neck(self.tower(x))

    torch.manual_seed(0)
    model = Detector().eval()
    expected = model(images())
    fastpeft.patch(model, METHODS["lora-q-v"])
    torch.testing.assert_close(model(images()), expected)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "tower.blocks.0.lora.q.A" in trained and "tower.head.weight" in trained and "neck.weight" not in trained
    assert set(fastpeft.parameter_groups(model)) == {"lora", "head"}
    fastpeft.unpatch(model, discard=True)
    assert type(model.tower) is type(vit())


def test_two_transformers():
    model = nn.ModuleList([vit(), vit()])
    fastpeft.patch(model)
    assert len(fastpeft.summary(model).fused) == 6
    with pytest.raises(MethodError, match=r"one transformer, but the model has 2 \(0\., 1\.\); patch the one you mean"):
        fastpeft.patch(model, METHODS["lora-q-v"])


def test_patching_what_surrounds_a_patched_model():
    inner = fastpeft.patch(vit(), METHODS["lora-q-v"])
    before = snapshot(inner)
    outer = fastpeft.patch(nn.Sequential(inner))
    assert_equal(snapshot(inner), before)
    with pytest.raises(MethodError, match="already carries LoRA"):
        fastpeft.patch(outer, METHODS["vpt-deep"])
    assert_equal(snapshot(inner), before)


@pytest.mark.parametrize("wrong", ["vpt", fastpeft.VPT, 3])
def test_a_method_that_is_none(wrong):
    with pytest.raises(MethodError, match=r"must be a fastpeft method such as fastpeft.VPT\(length=50\), got"):
        fastpeft.patch(vit(), wrong)


def test_backends():
    assert fastpeft.summary(fastpeft.patch(vit(), backend="reference")).fused
    with pytest.raises(FastPEFTError, match=r"backend must be one of auto, reference.*, got 'cudnn'"):
        fastpeft.patch(vit(), backend="cudnn")


def test_a_name_that_the_block_has_already():
    model = vit()
    model.blocks[1].lora = nn.Identity()
    before = snapshot(model)
    with pytest.raises(MethodError, match=r"blocks\.1 already has 'lora'"):
        fastpeft.patch(model, METHODS["lora-q-v"])
    assert_equal(snapshot(model), before)


@pytest.mark.parametrize("method", FEW)
def test_the_classes_are_still_theirs(method):
    model = patched(METHODS[method])
    assert isinstance(model, timm.models.vision_transformer.VisionTransformer)
    assert original_class(model.blocks[0]) is timm.models.vision_transformer.Block
    assert isinstance(model.blocks[0], timm.models.vision_transformer.Block)
    assert model.get_classifier() is model.head
    assert model.no_weight_decay() == vit().no_weight_decay()


def with_layers(norm=nn.LayerNorm, **options):
    """A model whose head is a norm and a linear layer, as somebody put it there."""
    model = vit(**options)
    model.head = nn.Sequential(norm(32), nn.Linear(32, 5)).to(model.head.weight.dtype)
    return model


@pytest.mark.parametrize("method", ["vpt-deep", "lora-q-v", "linear", "full"])
def test_a_head_of_several_modules_is_trained_as_it_is(method):
    model = with_layers()
    model.head.requires_grad_(False)
    before = snapshot(model)
    fastpeft.patch(model, METHODS[method])
    head = {"head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"}
    assert {name for name, _ in fastpeft.parameter_groups(model)["head"]} == head
    assert fastpeft.summary(model).head == 2 * 32 + 5 * 32 + 5
    model.train()(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.head.parameters())
    fastpeft.unpatch(model, discard=True).zero_grad()
    assert_equal(snapshot(model), before)
    fastpeft.patch(model, METHODS[method], train_head=False)
    assert not any(parameter.requires_grad for parameter in model.head.parameters()) or method == "full"


def test_hidden_layers_go_before_a_linear_head_only():
    model = with_layers()
    before = snapshot(model)
    with pytest.raises(MethodError, match=r"MLPHead: the head must be an nn\.Linear, got Sequential"):
        fastpeft.patch(model, fastpeft.MLPHead(2))
    assert_equal(snapshot(model), before)
    with pytest.raises(MethodError, match="the model has no head"):
        fastpeft.patch(vit(num_classes=0), fastpeft.MLPHead(2))


def with_layers(norm=nn.LayerNorm, **options):
    """A model whose head is a norm and a linear layer, as somebody put it there."""
    model = vit(**options)
    model.head = nn.Sequential(norm(32), nn.Linear(32, 5)).to(model.head.weight.dtype)
    return model


@pytest.mark.parametrize("method", ["vpt-deep", "lora-q-v", "linear", "full"])
def test_a_head_of_several_modules_is_trained_as_it_is(method):
    model = with_layers()
    model.head.requires_grad_(False)
    before = snapshot(model)
    fastpeft.patch(model, METHODS[method])
    head = {"head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"}
    assert {name for name, _ in fastpeft.parameter_groups(model)["head"]} == head
    assert fastpeft.summary(model).head == 2 * 32 + 5 * 32 + 5
    model.train()(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.head.parameters())
    fastpeft.unpatch(model, discard=True).zero_grad()
    assert_equal(snapshot(model), before)
    fastpeft.patch(model, METHODS[method], train_head=False)
    assert not any(parameter.requires_grad for parameter in model.head.parameters()) or method == "full"


def test_hidden_layers_go_before_a_linear_head_only():
    model = with_layers()
    before = snapshot(model)
    with pytest.raises(MethodError, match=r"MLPHead: the head must be an nn\.Linear, got Sequential"):
        fastpeft.patch(model, fastpeft.MLPHead(2))
    assert_equal(snapshot(model), before)
    with pytest.raises(MethodError, match="the model has no head"):
        fastpeft.patch(vit(num_classes=0), fastpeft.MLPHead(2))


def test_resetting_the_classifier_of_a_patched_model():
    model = fastpeft.patch(vit(), METHODS["vpt-deep"])
    model.reset_classifier(7)
    assert model(images()).shape == (3, 7)
    assert "head.weight" in dict(fastpeft.parameter_groups(model)["head"])
