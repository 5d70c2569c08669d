"""Which parts of an mPLUG a method adds to and trains, and how many values that are."""

from __future__ import annotations

import pytest
import torch

import fastpeft
from fastpeft import MethodError
from fastpeft.models.mplug import MPlug, MPlugConfig
from tests.methods.mplug_models import METHODS, assert_same, close, outputs
from tests.models.mplug.tiny import batch, make
from tests.tiny import randomise


def added(model: MPlug, name: str) -> set[str]:
    """The stacks that have tensors of a method."""
    found = {path.split(".")[0] for path, _ in model.named_parameters() if f".{name}." in path}
    return {path.removesuffix("_encoder").removeprefix("text_") for path in found}


@pytest.mark.parametrize(
    "stacks, expected",
    [
        (None, {"text", "fusion", "decoder"}),
        ("text", {"text"}),
        (("fusion", "decoder"), {"fusion", "decoder"}),
    ],
)
def test_stacks(stacks, expected):
    model = fastpeft.patch(make(), fastpeft.LoRA(2, stacks=stacks))
    assert added(model, "lora") == expected
    model = fastpeft.patch(make(), fastpeft.PromptTuning(2, stacks=stacks))
    assert added(model, "prompt_tuning") == expected - {"fusion"}


def test_stacks_that_do_not_fit():
    with pytest.raises(MethodError, match="mPLUG has no stack 'vision'; it has: image, text, fusion, decoder"):
        fastpeft.patch(make(), fastpeft.LoRA(2, stacks=("text", "vision")))
    with pytest.raises(MethodError, match="no stack here whose input can be prompted"):
        fastpeft.patch(make(), fastpeft.PromptTuning(2, stacks="fusion"))
    with pytest.raises(MethodError, match="no block attends to a memory"):
        fastpeft.patch(make(), fastpeft.SerialAdapter(2, locations=("cross",), stacks="text"))


def test_the_image_tower_is_frozen_and_has_no_part_in_methods():
    for method in METHODS.values():
        model = fastpeft.patch(make(), method)
        inside = [name for name, p in model.visual_encoder.named_parameters() if p.requires_grad]
        assert bool(inside) == bool({part.name for part in method.parts()} & {"full", "bitfit"})
        assert model.visual_encoder.state_dict().keys() == make().visual_encoder.state_dict().keys()


@pytest.mark.parametrize("method", [fastpeft.Full, fastpeft.BitFit])
def test_backbones_of_chosen_stacks(method):
    model = fastpeft.patch(make(), method(stacks=("fusion",)))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    inside = {name for name in make().state_dict() if name.startswith("fusion_encoder.")}
    assert trained == {name for name in inside if method is fastpeft.Full or name.endswith("bias")}


def test_classifier():
    head = "text_decoder.cls.predictions."
    transform = {head + "bias"} | {
        f"{head}transform.{layer}.{kind}" for layer in ("dense", "LayerNorm") for kind in ("weight", "bias")
    }
    tied = "text_decoder.bert.embeddings.word_embeddings.weight"
    for part, expected in (("head", {*transform, tied}), ("transform", transform)):
        model = fastpeft.patch(make(), fastpeft.Classifier(part))
        assert {name for name, p in model.named_parameters() if p.requires_grad} == expected
    with pytest.raises(MethodError, match="part must be one of head, transform, got 'vocabulary'"):
        fastpeft.patch(make(), fastpeft.Classifier("vocabulary"))


def test_gradients_of_a_classifier_are_the_plain_models():
    results = []
    for method in (None, fastpeft.LoRA(2) + fastpeft.Classifier()):
        model, given = make(dropout=0.0, attention_dropout=0.0).double(), batch(dtype=torch.float64)
        if method is not None:
            fastpeft.patch(model, method).double()
        memory = model.memory(model.encode_image(given.images), given.ids, given.mask)
        names = [n for n in make().state_dict() if ".cls." in n or n.startswith("text_decoder.bert.embeddings.word")]
        loss = model.caption_loss(given.text, memory)
        results.append(torch.autograd.grad(loss, [model.get_parameter(name) for name in names]))
        assert len(names) == 6
    for one, other in zip(*results, strict=True):
        close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("form", ["hidden", "kv"])
def test_gradients_of_a_prefix_by_a_network(form):
    # Through the network: those of the rows that it makes, which a prefix without one has as its parameters.
    made, plain = (
        randomise(fastpeft.patch(make(), fastpeft.PrefixTuning(3, form=form, mlp=mlp)).double()) for mlp in (5, None)
    )
    places = [path for path, _ in made.fastpeft_host.spec.blocks]
    rows, parameters, direct = [], [], []
    for path in places:
        network, fixed = made.get_submodule(path).prefix, plain.get_submodule(path).prefix
        found = (network.rows(1, torch.float64, None),) if form == "hidden" else network.keys_values()
        targets = (fixed.prompts,) if form == "hidden" else (fixed.k, fixed.v)
        with torch.no_grad():
            for parameter, value in zip(targets, found, strict=True):
                parameter.copy_(value)
        rows += found
        direct += targets
        parameters += network.parameters()
    given = batch(dtype=torch.float64)
    losses = []
    for model in (made, plain):
        memory = model.memory(model.encode_image(given.images), given.ids, given.mask)
        losses.append(model.eval().caption_loss(given.text, memory))
    close(losses[0], losses[1], rtol=1e-10, atol=1e-12)
    expected = torch.autograd.grad(rows, parameters, torch.autograd.grad(losses[1], direct))
    for one, other in zip(torch.autograd.grad(losses[0], parameters), expected, strict=True):
        close(one, other, rtol=1e-8, atol=1e-11)


@pytest.fixture(scope="module")
def base():
    with torch.device("meta"):
        return MPlug(MPlugConfig.base())


COUNTS = {
    "prompt, a site": (fastpeft.PromptTuning(128, stacks="text"), 98_304),
    "prompt": (fastpeft.PromptTuning(2), 2 * 1_536),
    "prefix": (fastpeft.PrefixTuning(2, form="hidden"), 36_864),
    "prefix, long": (fastpeft.PrefixTuning(128, form="hidden"), 2_359_296),
    "lora, shared": (fastpeft.LoRA(2, targets=("q", "k"), heads="shared"), 136_448),
    "lora, shared, 32": (fastpeft.LoRA(32, targets=("q", "k"), heads="shared"), 2_183_168),
    "lora": (fastpeft.LoRA(2, targets=("q", "k")), 251_904),
    "lora, 32": (fastpeft.LoRA(32, targets=("q", "k")), 4_030_464),
    "lora, self only": (fastpeft.LoRA(2, targets=("q", "k"), cross=False), 147_456),
    "lora, each": (fastpeft.LoRA(2, targets=("q", "k"), heads="each"), 41 * 19_968 * 2),
    "serial": (fastpeft.SerialAdapter(16), 1_179_648),
    "parallel, 512": (fastpeft.ParallelAdapter(512), 37_748_736),
    "serial, biases": (fastpeft.SerialAdapter(16, bias=True), 1_217_280),
    "parallel, biases, 512": (fastpeft.ParallelAdapter(512, bias=True), 37_810_176),
    "classifier": (fastpeft.Classifier(), 24_063_546),
    "transform": (fastpeft.Classifier("transform"), 622_650),
}


@pytest.mark.parametrize("name", COUNTS)
def test_trained_parameters_of_the_base_model(base, name):
    method, expected = COUNTS[name]
    fastpeft.patch(base, method)
    try:
        assert sum(p.numel() for p in fastpeft.trainable_parameters(base)) == expected
    finally:
        fastpeft.unpatch(base, discard=True)
    assert sum(p.numel() for p in base.parameters()) == 344_437_818


@pytest.mark.parametrize(
    "name", [n for n in METHODS if not n.startswith(("parallel, its own", "prompt", "prefix", "vpt"))]
)
def test_methods_that_start_as_the_identity(name):
    plain, model = make().double(), fastpeft.patch(make().double(), METHODS[name]).double()
    with torch.no_grad():
        assert_same(outputs(model.eval()), outputs(plain))
