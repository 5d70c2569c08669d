"""Somebody looks at modules inside an mPLUG, replaces them or wraps them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import MethodError, UnsupportedModelError
from fastpeft.models.mplug import MPlug
from fastpeft.models.mplug.layers import BertLayer
from tests.methods.mplug_models import METHODS, assert_same, close, greedy, outputs, patched
from tests.models.mplug.tiny import make


def hooks_on(model: MPlug, seen: list) -> list:
    """On every module of the layers, of what is called in a plain model."""
    handles = []
    for path, module in model.named_modules():
        if ".layer." not in path or any(path.endswith(end) for end in ("lora", "prefix", "adapter", "_tuning")):
            continue

        def note(module, args, kwargs, out, path=path):
            seen.append((path, [a.detach() for a in args if isinstance(a, torch.Tensor)], out.detach()))

        handles.append(module.register_forward_hook(note, with_kwargs=True))
    return handles


def test_hooks_of_a_patched_model_see_what_those_of_a_plain_one_see():
    plain, model = make().double(), fastpeft.patch(make().double())
    seen: list[list] = [[], []]
    results = []
    for each, notes in zip((plain, model), seen, strict=True):
        hooks_on(each, notes)
        results.append(outputs(each))
    assert_same(results[1], results[0])
    assert [path for path, *_ in seen[0]] == [path for path, *_ in seen[1]]
    for (path, args, out), (_, found, found_out) in zip(*seen, strict=True):
        close(found_out, out, msg=lambda m, path=path: f"{path}: {m}")
        for one, other in zip(found, args, strict=True):
            close(one, other, msg=lambda m, path=path: f"{path}: {m}")


@pytest.mark.parametrize("name", [n for n in METHODS if "dropout" not in n and n != "full"])
def test_hooks_change_no_result(name):
    model = patched(name).eval()
    expected = outputs(model)
    text = greedy(model, cached=True)
    seen: list = []
    handles = hooks_on(model, seen)
    assert_same(outputs(model), expected)
    assert torch.equal(greedy(model, cached=True), text)
    places = {path.split(".layer.")[1].split(".", 1)[-1] for path, *_ in seen}
    assert {"intermediate", "output", "attention.output", "crossattention.output", "attention.self.query"} <= places
    for handle in handles:
        handle.remove()
    seen.clear()
    assert_same(outputs(model), expected, rtol=0, atol=0)
    assert not seen


@pytest.mark.parametrize("container", ["attention.output", "crossattention.output", "intermediate", "output"])
def test_a_hook_may_change_what_a_container_gives(container):
    results = []
    for model in (make().double(), patched("lora")):
        with torch.no_grad():
            for parameter in fastpeft.trainable_parameters(model):
                if parameter.shape[-1] == 2:
                    parameter.zero_()
        layer = model.text_decoder.bert.encoder.layer[0]
        layer.get_submodule(container).register_forward_hook(lambda m, args, out: 0.5 * out)
        results.append(outputs(model))
    assert_same(results[1], results[0])


def test_a_layer_whose_forward_was_replaced_is_given_masks_and_memory():
    model, plain = patched("lora").eval(), outputs(patched("lora").eval())
    for stack in (model.text_encoder, model.fusion_encoder, model.text_decoder.bert):
        for _, layer in stack.encoder.numbered():
            inner = layer.forward
            layer.forward = lambda *a, inner=inner, **k: inner(*a, **k)
    assert_same(outputs(model), plain)


class Louder(BertLayer):
    def forward(self, x, *args, **kwargs):
        return 2 * super().forward(x, *args, **kwargs)


@pytest.mark.parametrize("numbers", [(0,), (0, 1)])
def test_layers_of_another_class_are_left_alone(numbers):
    model, plain = make().double(), make().double()
    for each in (model, plain):
        for number in numbers:
            each.text_encoder.encoder.layer[number].__class__ = Louder
            each.text_decoder.bert.encoder.layer[number].__class__ = Louder
    with pytest.raises(UnsupportedModelError, match=r"layer\.0: a Louder is not mPLUG's BertLayer"):
        fastpeft.patch(copy.deepcopy(model))
    fastpeft.patch(model, strict=False)
    assert_same(outputs(model), outputs(plain))
    assert len(fastpeft.summary(model).left_alone) == 2 * len(numbers)
    with pytest.raises(MethodError, match=r"LoRA needs every block, but text_encoder\.encoder\.layer\.0 is left alone"):
        fastpeft.patch(model, fastpeft.LoRA(2))


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("name", ["prompt", "lora"])
def test_layers_that_were_wrapped_since(name):
    model, expected = patched(name).eval(), outputs(patched(name).eval())
    for encoder in (model.text_encoder.encoder, model.fusion_encoder.encoder, model.text_decoder.bert.encoder):
        for key, layer in list(encoder.layer.named_children()):
            encoder.layer._modules[key] = Wrapper(layer)
    assert_same(outputs(model), expected)


def test_an_own_forward_of_a_subclass_is_not_run_by_the_engine():
    class Other(MPlug):
        def fuse(self, text, image):
            return image, text

    model = make()
    model.__class__ = Other
    with pytest.raises(UnsupportedModelError, match="Other has a fuse of its own"):
        fastpeft.patch(model)
