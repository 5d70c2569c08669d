"""Methods in mPLUG's image tower, which is a transformer of another family inside the model."""

from __future__ import annotations

import copy
import io
import re

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import fastpeft
from fastpeft import MethodError
from fastpeft.engine.extensions import Extension
from fastpeft.models.mplug import MPlug
from tests.methods.mplug_models import assert_same, close, outputs, step
from tests.methods.test_mplug import assert_parity
from tests.models.mplug.tiny import TINY, batch, beside_rows, make
from tests.tiny import randomise

ALL = ("image", "text", "fusion", "decoder")
METHODS = {
    "lora": fastpeft.LoRA(2, alpha=3, targets=("q", "k"), stacks="image"),
    "lora, head by head": fastpeft.LoRA(2, targets=("q", "k"), heads="each", stacks="image"),
    "lora, everywhere": fastpeft.LoRA(2, targets=("q", "k"), heads="shared", stacks=ALL),
    "serial": fastpeft.SerialAdapter(6, stacks="image"),
    "serial, everywhere": fastpeft.SerialAdapter(6, bias=True, stacks=ALL),
    "parallel, everywhere": fastpeft.ParallelAdapter(6, skip=True, stacks=ALL),
    "prefix, keys and values": fastpeft.PrefixTuning(3, stacks="image"),
    "prefix, everywhere": fastpeft.PrefixTuning(3, form="hidden", stacks=ALL),
    "two": fastpeft.LoRA(2, targets=("q", "k"), stacks=("image", "text")) + fastpeft.PromptTuning(2),
}
DRAWING = fastpeft.LoRA(2, dropout=0.3, stacks=ALL)


def patched(method, double: bool = True) -> MPlug:
    model = fastpeft.patch(make(), method)
    return randomise(model.double() if double else model)


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def parts(model: nn.Module) -> set[str]:
    """The parts of the model that hold a tensor which is trained."""
    return {name.split(".")[0] for name in trained(model)}


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_patched_model_is_the_literal_one(method):
    assert_parity(method, training=True)


def test_a_tower_takes_part_where_it_is_named():
    assert parts(fastpeft.patch(make(), fastpeft.LoRA(2))) == {"text_encoder", "fusion_encoder", "text_decoder"}
    assert parts(fastpeft.patch(make(), fastpeft.LoRA(2, stacks=["image", "text"]))) == {
        "visual_encoder",
        "text_encoder",
    }
    # Prompts stand before texts, and a tower has no attention to a memory: other stacks have.
    assert parts(fastpeft.patch(make(), fastpeft.PromptTuning(2, stacks=("image", "text")))) == {"text_encoder"}
    crossed = fastpeft.patch(make(), fastpeft.SerialAdapter(2, locations=("attn", "cross"), stacks=ALL))
    assert {name for name in trained(crossed) if ".cross." in name and name.startswith("visual")} == set()
    blocks = {name for name in make().state_dict() if name.startswith("visual_encoder.blocks.")}
    full = fastpeft.patch(make(), fastpeft.Full(stacks="image"))
    assert trained(full) == blocks
    bitfit = fastpeft.patch(make(), fastpeft.BitFit(stacks=("image", "decoder")))
    assert {n for n in trained(bitfit) if n.startswith("visual")} == {n for n in blocks if n.endswith("bias")}
    assert parts(bitfit) == {"visual_encoder", "text_decoder"}


def test_a_tower_alone_is_that_transformer_to_a_method():
    # Prompts that are carried from block to block, which mPLUG's own stacks refuse.
    method = fastpeft.VPT(3, deep=False)
    alone = fastpeft.patch(make().visual_encoder, method).eval()
    model = fastpeft.patch(make(), fastpeft.VPT(3, deep=False, stacks="image"))
    assert {f"visual_encoder.{name}" for name in trained(alone)} == trained(model)
    model.visual_encoder.blocks[0].vpt.load_state_dict(alone.blocks[0].vpt.state_dict())
    images = batch().images
    assert torch.equal(model.visual_encoder.forward_features(images), alone.forward_features(images))
    with pytest.raises(MethodError, match=r"share='inter' needs blocks of one width, but .* has 32 after 48"):
        fastpeft.patch(make(), fastpeft.VPT(3, share="inter", stacks=("image", "text")))


@pytest.mark.parametrize(
    "method, message",
    [
        (fastpeft.PromptTuning(2, stacks="image"), "VisionTransformer has no stack here whose input can be prompted"),
        (fastpeft.SerialAdapter(2, locations=("cross",), stacks="image"), "no block attends to a memory"),
        (fastpeft.LoRA(2, targets=("qkv",), stacks=("image", "text")), "text_encoder.* has no projection 'qkv'"),
        (fastpeft.LoRA(2, targets=("x",), stacks="image"), "visual_encoder.blocks.0 has no projection 'x'"),
        (fastpeft.Classifier(stacks="image"), "VisionTransformer has no output layer of that kind"),
        (fastpeft.ClassToken(stacks="image"), "reads no learned token"),
        (fastpeft.MLPHead(stacks="image"), "the model has no head"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_what_does_not_fit_a_tower(method, message):
    model = make()
    names = set(model.state_dict())
    if method.name != "lora":
        # Something is in the tower already when the error comes.
        method = fastpeft.LoRA(2, stacks=ALL) + method
    with pytest.raises(MethodError, match=message):
        fastpeft.patch(model, method)
    assert set(model.state_dict()) == names and len(trained(model)) == len(dict(model.named_parameters()))


def test_a_tower_that_the_engine_does_not_run():
    model = make()
    model.visual_encoder.blocks[1].forward = lambda x, **options: x
    fastpeft.patch(model, fastpeft.LoRA(2), strict=False)
    assert "visual_encoder" not in parts(model)
    model = fastpeft.unpatch(model, discard=True)
    with pytest.raises(MethodError, match=r"'image' needs every block, but visual_encoder\.blocks\.1 is left alone"):
        fastpeft.patch(model, fastpeft.LoRA(2, stacks="image"), strict=False)
    model = make()
    model.visual_encoder.forward_features = lambda x: x
    with pytest.raises(MethodError, match="the engine does not run visual_encoder, which is the stack 'image'"):
        fastpeft.patch(model, fastpeft.LoRA(2, stacks="image"), strict=False)


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
@pytest.mark.parametrize("method", [fastpeft.Full(), fastpeft.BitFit()], ids=["full", "bitfit"])
def test_what_a_tower_reads_out_with_is_not_trained(method, pool):
    """The model asks it for its tokens: a classifier of its own, and what pools for it, would get no gradient."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
    model = MPlug(TINY, VisionTransformer(**sizes, global_pool=pool, fc_norm=pool != "token"))
    readout = {name for name, _ in model.named_parameters() if re.search(r"\.(head|fc_norm|attn_pool)\.", name)}
    assert len(readout) >= 2
    fastpeft.patch(model, method)
    every = {name for name, _ in model.named_parameters()}
    if isinstance(method, fastpeft.Full):
        assert trained(model) == every - readout
    given = batch()
    image = model.encode_image(given.images)
    model.caption_loss(given.text, model.memory(image, given.ids, given.mask)).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained(model)
    assert not trained(model) & readout
    fastpeft.unpatch(model, discard=True)
    assert trained(model) == every


def test_every_forward_of_a_tower_draws_its_own_masks():
    model = patched(DRAWING)
    once = step(model)
    assert_same(step(model), once)
    # A forward of the tower, of the text encoder and of the decoder; one counter for all three.
    assert fastpeft.get_rng_state(model)["step"] == 3
    places = [module.site for module in model.modules() if isinstance(module, Extension)]
    assert len(set(places)) == len(places) == 10
    given = batch(dtype=torch.float64)
    one, other = (model.encode_image(given.images).states for _ in range(2))
    assert not torch.equal(one, other)
    # The frozen model rests while the method trains, here too, and eval() stops the masks.
    assert not any(module.training for module in model.modules() if isinstance(module, nn.Dropout))
    model.eval()
    close(model.encode_image(given.images).states, model.encode_image(given.images).states, rtol=0, atol=0)
    recomputed = patched(DRAWING)
    assert_same(step(fastpeft.patch(recomputed, memory="small")), once, rtol=1e-9, atol=1e-11)
    assert fastpeft.get_rng_state(fastpeft.patch(make(), fastpeft.LoRA(2, dropout=0.1, stacks="image"))) != {}


def test_copies():
    model = patched(DRAWING)
    expected = step(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for twin in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        assert_same(step(twin), expected)
        assert twin.visual_encoder.fastpeft_host.clock is twin.fastpeft_host.clock is not model.fastpeft_host.clock


@torch.no_grad()
@pytest.mark.parametrize("name", ["lora, everywhere", "serial", "prefix, everywhere", "full"])
def test_saved_loaded_and_taken_back(name, tmp_path):
    model = make()
    kept = [(type(module), module.__dict__.keys(), module.training) for module in model.modules()]
    before, required = outputs(model, torch.float32), trained(model)
    fastpeft.patch(model, METHODS.get(name, fastpeft.Full(stacks="image")))
    for parameter in fastpeft.trainable_parameters(model):
        parameter.add_(0.1 * torch.randn_like(parameter))
    fastpeft.save(model.train(), tmp_path / "out")
    loaded = fastpeft.load(make(), tmp_path / "out")
    assert fastpeft.summary(loaded).method == fastpeft.summary(model).method
    assert_same(outputs(loaded.eval(), torch.float32), outputs(model.eval(), torch.float32), rtol=0, atol=0)
    assert not torch.equal(outputs(model, torch.float32)["logits"], before["logits"])
    fastpeft.unpatch(model, discard=True)
    assert [(type(module), module.__dict__.keys(), module.training) for module in model.modules()] == kept
    assert trained(model) == required
    if name != "full":
        assert_same(outputs(model, torch.float32), before, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("targets", [("q", "v"), ("fc1", "o"), ("fc1",)])
def test_cross_attention_is_saved_beside_a_tower_of_no_family(targets, cross, tmp_path):
    model = randomise(fastpeft.patch(beside_rows(), fastpeft.LoRA(2, targets=targets, cross=cross)))
    fastpeft.save(model, tmp_path)
    # peft has one pair a layer that is named, and no word for the same role of another attention.
    crosses = cross and targets != ("fc1",)
    assert ("peft_type" in fastpeft.read_config(tmp_path)) != crosses
    loaded = fastpeft.load(beside_rows(), tmp_path)
    assert any(".cross_" in name for name in trained(loaded)) == crosses
    assert_same(outputs(loaded, torch.float32), outputs(model, torch.float32), rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["lora, everywhere", "prefix, everywhere"])
def test_merged(name):
    model = patched(METHODS[name]).eval()
    expected = outputs(model)
    fastpeft.merge(model)
    assert_same(outputs(model), expected, rtol=1e-8, atol=1e-9)
    if name.startswith("lora"):
        assert "visual_encoder.blocks.1.q" in fastpeft.summary(model).merged
        assert type(fastpeft.unpatch(model)) is MPlug and set(model.state_dict()) == set(make().state_dict())
        assert_same(outputs(model), expected, rtol=1e-8, atol=1e-9)
    with pytest.raises(MethodError, match=r"visual_encoder\.blocks\.0\.serial_adapter: a Adapters is not linear"):
        fastpeft.merge(patched(METHODS["serial"]))


def test_summary_and_groups():
    model = fastpeft.patch(make(), METHODS["two"])
    found = fastpeft.summary(model)
    fused = dict(found.fused)
    assert fused["visual_encoder.blocks.0"] == "attention + mlp + lora"
    assert fused["text_encoder.encoder.layer.0"] == "attention + mlp + lora + prompt_tuning"
    assert "stacks=('image', 'text')" in found.method and found.left_alone == []
    groups = fastpeft.parameter_groups(model)
    assert set(groups) == {"lora", "prompt_tuning"}
    assert {name.split(".")[0] for name, _ in groups["lora"]} == {"visual_encoder", "text_encoder"}
    assert found.trainable == sum(p.numel() for group in groups.values() for _, p in group)
    assert found.backbone == found.total - found.trainable == sum(p.numel() for p in make().parameters())
    with pytest.raises(fastpeft.FastPEFTError, match="carries the method of a model around it"):
        fastpeft.patch(model.visual_encoder)
