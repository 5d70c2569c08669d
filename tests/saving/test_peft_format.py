"""LoRA folders travel both ways between fastpeft and peft; what cannot travel is refused by name."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import fastpeft
from tests.dropin.adapted import ALL, lora, randomise
from tests.dropin.both import assert_same_state
from tests.models.mplug.tiny import batch, beside_rows
from tests.tiny import images, patched, vit

# Metadata that fastpeft adds to the config is new to peft, which says so.
pytestmark = pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")

X = images(dtype=torch.float64)
TARGETS = [("q", "v"), ("k",), ("q", "k", "v"), ("qkv",), ("o",), ("q", "v", "o", "fc1"), ("k", "fc1", "fc2")]


def assert_same_outputs(expected, actual) -> None:
    """Equal logits in evaluation mode."""
    torch.testing.assert_close(actual.double().eval()(X), expected.double().eval()(X), rtol=1e-10, atol=1e-10)


def saved(folder, targets=("q", "v"), train_head=True, variant="class_token", **options):
    """A trained fastpeft LoRA in a folder."""
    model = fastpeft.patch(vit(variant), fastpeft.LoRA(2, targets=targets, **options), train_head=train_head)
    with torch.no_grad():
        for parameter in fastpeft.trainable_parameters(model):
            parameter.add_(0.3 * torch.randn_like(parameter))
    fastpeft.save(model, folder, base_model="a name", image_size=32)
    return model


@pytest.mark.parametrize("alpha", [None, 5])
@pytest.mark.parametrize("targets", TARGETS)
def test_peft_reads_what_fastpeft_saved(tmp_path, targets, alpha):
    model = saved(tmp_path, targets, alpha=alpha, dropout=0.1)
    loaded = PeftModel.from_pretrained(vit(), tmp_path)
    assert_same_outputs(model, loaded)
    assert_same_outputs(model, fastpeft.patch(loaded))
    assert_same_outputs(model, fastpeft.load(vit(), tmp_path))
    assert loaded.peft_config["default"].lora_dropout == 0.1


def test_slices_of_a_fused_projection_are_blocks_of_b(tmp_path):
    model = saved(tmp_path, ("q", "v"))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    b = tensors["base_model.model.blocks.1.attn.qkv.lora_B.weight"]
    assert b.shape == (96, 4)
    pair = model.blocks[1].lora
    assert torch.equal(b[:32, :2], pair.q.B) and torch.equal(b[64:, 2:], pair.v.B)
    assert not b[32:64].any() and not b[:32, 2:].any() and not b[64:, :2].any()


def test_ranks_that_differ_are_patterns(tmp_path):
    saved(tmp_path, ("q", "v", "o", "fc1"), alpha=3)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 3.0)
    assert config["rank_pattern"] == {f"blocks.{i}.attn.qkv": 4 for i in range(3)}
    assert config["alpha_pattern"] == {f"blocks.{i}.attn.qkv": 6.0 for i in range(3)}
    assert config["modules_to_save"] == ["head"]


def test_more_layers_than_peft_lists_one_by_one(tmp_path):
    """From 20 targets on peft looks for common endings of their names."""
    method = fastpeft.LoRA(2, targets=("q", "v", "o", "fc1", "fc2"))
    model = patched(method, depth=7)
    fastpeft.save(model, tmp_path)
    assert_same_outputs(model, PeftModel.from_pretrained(vit(depth=7), tmp_path))


def test_a_head_of_several_modules(tmp_path):
    def base(seed):
        model = vit()
        torch.manual_seed(seed)
        model.head = torch.nn.Sequential(torch.nn.LayerNorm(32), torch.nn.Linear(32, 5))
        return model

    model = randomise(fastpeft.patch(base(1), fastpeft.LoRA(2)))
    fastpeft.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["head"]
    for seed in (2, 3):
        assert_same_outputs(model, fastpeft.load(base(seed), tmp_path))
        assert_same_outputs(model, PeftModel.from_pretrained(base(seed), tmp_path))


@pytest.mark.parametrize("variant", ["distilled", "average_pool", "registers", "no_biases"])
@pytest.mark.parametrize("train_head", [True, False])
def test_variants_and_heads(tmp_path, variant, train_head):
    model = saved(tmp_path, ("q", "v", "o"), train_head, variant)
    assert_same_outputs(model, PeftModel.from_pretrained(vit(variant), tmp_path))
    assert_same_outputs(model, fastpeft.load(vit(variant), tmp_path))


def test_training_goes_on_in_peft(tmp_path):
    saved(tmp_path)
    loaded = PeftModel.from_pretrained(vit(), tmp_path, is_trainable=True)
    names = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert any("head.modules_to_save.default.weight" in name for name in names)
    randomise(loaded)
    loaded.save_pretrained(tmp_path / "again")
    again = fastpeft.load(vit(), tmp_path / "again")
    assert_same_outputs(loaded, again)
    assert again.fastpeft_record.method == fastpeft.LoRA(4, 4.0, ("qkv",))


def written(folder, config, seed=0, **options):
    """A trained peft adapter in a folder."""
    model = randomise(get_peft_model(vit(**options), copy.deepcopy(config)), seed)
    model.save_pretrained(folder)
    return model


LOADED = {
    "qkv": (lora(), fastpeft.LoRA(4, 8.0, ("qkv",))),
    "head": (lora(modules_to_save=["head"]), fastpeft.LoRA(4, 8.0, ("qkv",))),
    "all": (lora(target_modules=ALL, lora_dropout=0.1), fastpeft.LoRA(4, 8.0, ("fc1", "fc2", "o", "qkv"), 0.1)),
    "rslora": (lora(use_rslora=True), fastpeft.LoRA(4, 16.0, ("qkv",))),
    "proj": (lora(target_modules=["attn.proj"], lora_alpha=3), fastpeft.LoRA(4, 3.0, ("o",))),
    "by pattern": (lora(r=2, rank_pattern={"qkv": 3}, alpha_pattern={".*qkv": 6}), fastpeft.LoRA(3, 6.0, ("qkv",))),
    "by regular expression": (lora(target_modules=r".*\.(fc1|fc2)"), fastpeft.LoRA(4, 8.0, ("fc1", "fc2"))),
    "gaussian": (lora(init_lora_weights="gaussian"), fastpeft.LoRA(4, 8.0, ("qkv",))),
}


@pytest.mark.parametrize("kind", LOADED)
def test_fastpeft_reads_what_peft_saved(tmp_path, kind):
    config, method = LOADED[kind]
    model = written(tmp_path, config)
    loaded = fastpeft.load(vit(), tmp_path)
    assert loaded.fastpeft_record.method == method
    assert any(name.startswith("head") for name, p in loaded.named_parameters() if p.requires_grad) == (kind == "head")
    assert_same_outputs(model, loaded)
    fastpeft.save(loaded, tmp_path / "again")
    assert_same_outputs(model, PeftModel.from_pretrained(vit(), tmp_path / "again"))


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["head"]}])
def test_merging_a_loaded_adapter(tmp_path, options):
    model = written(tmp_path, lora(target_modules=ALL, **options))
    merged = fastpeft.unpatch(fastpeft.merge(fastpeft.load(vit(), tmp_path)))
    torch.testing.assert_close(merged.eval()(images()), model.eval()(images()), rtol=1e-4, atol=1e-4)


REFUSED = {
    "another tuner": (IA3Config(target_modules=["qkv"], feedforward_modules=[]), "its type is 'IA3'"),
    "DoRA": (lora(use_dora=True), "use_dora=True is not plain LoRA"),
    "LoRA's own bias": (lora(lora_bias=True), "lora_bias=True"),
    "trained biases": (lora(bias="all"), "bias='all'"),
    "a changed base": (lora(init_lora_weights="pissa"), "init_lora_weights='pissa' changed the base's weights"),
    "on the head": (lora(target_modules=["qkv", "head"]), r"head\.lora_A\.weight is not on a projection"),
    "on the patches": (
        lora(target_modules=["qkv", "patch_embed.proj"]),
        r"patch_embed\.proj\.lora_A\.weight is not on a",
    ),
    "saved norms": (lora(modules_to_save=["norm"]), r"norm\.(weight|bias) is neither LoRA .* nor the head"),
    "one block": (lora(layers_to_transform=[1], layers_pattern="blocks"), r"blocks\.0\.attn\.qkv has no LoRA while"),
    "ranks": (
        lora(target_modules=["qkv", "fc1"], rank_pattern={"fc1": 2}, alpha_pattern={"fc1": 4}),
        r"blocks\.0\.attn\.qkv has rank 4 and scale 2, blocks\.0\.mlp\.fc1 has rank 2 and scale 2",
    ),
    "scales": (lora(target_modules=["qkv", "fc1"], alpha_pattern={"fc1": 4}), r"mlp\.fc1 has rank 4 and scale 1"),
    "a parameter": (lora(target_modules=[], target_parameters=["qkv.weight"]), "target_parameters=.*is not plain LoRA"),
}


def assert_refused(folder, message: str, **options) -> None:
    """Loading fails with the message, on a plain and on a patched model, and changes neither."""
    for prepare in (lambda model: model, fastpeft.patch):
        model, untouched = prepare(vit(**options).eval()), vit(**options).eval()
        classes = [type(module) for module in model.modules()]
        with pytest.raises(fastpeft.FastPEFTError, match=message):
            fastpeft.load(model, folder)
        assert classes == [type(module) for module in model.modules()]
        assert_same_state(untouched, model)
        torch.testing.assert_close(model(images()), untouched(images()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_plain_lora_is_refused_by_name(tmp_path, kind):
    config, message = REFUSED[kind]
    written(tmp_path, config)
    assert_refused(tmp_path, message)
    with pytest.raises(fastpeft.FastPEFTError, match=r"PeftModel\.from_pretrained and call fastpeft\.patch"):
        fastpeft.load(vit(), tmp_path)
    # And that way it runs.
    loaded = fastpeft.patch(PeftModel.from_pretrained(vit(), tmp_path))
    assert len(fastpeft.summary(loaded).fused) == 3


@pytest.mark.parametrize(
    "layers, message",
    [
        ("attention", None),
        ("(attention|crossattention)", r"layer\.0, cross_q, has no LoRA while other blocks have"),
    ],
)
def test_a_model_whose_blocks_attend_to_a_memory(layers, message, tmp_path):
    config = lora(target_modules=rf".*\.{layers}\.self\.query")
    randomise(get_peft_model(beside_rows(), config)).save_pretrained(tmp_path)
    if message is not None:
        with pytest.raises(fastpeft.FastPEFTError, match=message):
            fastpeft.load(beside_rows(), tmp_path)
        return
    loaded, peft = fastpeft.load(beside_rows(), tmp_path), PeftModel.from_pretrained(beside_rows(), tmp_path)
    given = batch()
    found, expected = (model.encode_text(given.ids, given.mask).states for model in (loaded, peft.base_model.model))
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found, beside_rows().encode_text(given.ids, given.mask).states)


def edit(folder, change_config=lambda config: None, change_tensors=lambda tensors: None) -> None:
    """Change a folder that peft wrote."""
    path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config, tensors = json.loads(path.read_text()), load_file(weights)
    change_config(config), change_tensors(tensors)
    path.write_text(json.dumps(config))
    save_file(tensors, weights)


def drop(name):
    """Remove one tensor."""
    return lambda tensors: tensors.pop(name)


def cut(name):
    """Shorten one tensor."""
    return lambda tensors: tensors.update({name: tensors[name][:, :-1].contiguous()})


B = "base_model.model.blocks.2.attn.qkv.lora_B.weight"
A = B.replace("lora_B", "lora_A")
DAMAGED = {
    "no B": ({"change_tensors": drop(B)}, rf"lacks {B}"),
    "no tensors": ({"change_tensors": lambda t: t.clear()}, "holds no LoRA tensors"),
    "a shape": ({"change_tensors": cut(A)}, r"blocks\.2\.lora\.qkv\.A has shape \(4, 31\), the model's has \(4, 32\)"),
    "half a head": ({"change_tensors": drop("base_model.model.head.bias")}, r"lacks head\.bias"),
    "an unknown tensor": ({"change_tensors": lambda t: t.update(extra=torch.zeros(1))}, "extra is neither LoRA"),
    "an option of a later release": ({"change_config": lambda c: c.update(use_new=True)}, "use_new=True is not plain"),
    "alpha": ({"change_config": lambda c: c.update(lora_alpha="8")}, "lora_alpha of .* is '8', and a positive number"),
    "dropout": ({"change_config": lambda c: c.update(lora_dropout=2)}, "dropout must be in"),
    "no type": ({"change_config": lambda c: c.pop("peft_type")}, "its type is None"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_folders(tmp_path, kind):
    changes, message = DAMAGED[kind]
    written(tmp_path, lora(modules_to_save=["head"]))
    edit(tmp_path, **changes)
    assert_refused(tmp_path, message)


def test_models_that_do_not_fit(tmp_path):
    written(tmp_path / "classes", lora(modules_to_save=["head"]))
    assert_refused(tmp_path / "classes", r"head\.\w+ has shape .*num_classes=5", num_classes=7)
    written(tmp_path / "width", lora(), embed_dim=64)
    assert_refused(tmp_path / "width", r"lora\.qkv\.A has shape \(4, 64\), the model's has \(4, 32\)")
    written(tmp_path / "depth", lora(), depth=4)
    assert_refused(tmp_path / "depth", r"blocks\.3\.attn\.qkv\.lora_A\.weight is not on a projection")
    written(tmp_path / "shallow", lora(), depth=2)
    assert_refused(tmp_path / "shallow", r"blocks\.2\.attn\.qkv has no LoRA while other blocks have")


def test_metadata_cannot_take_the_formats_names(tmp_path):
    model = patched(fastpeft.LoRA(2))
    with pytest.raises(fastpeft.FastPEFTError, match="must not use the names lora_alpha, rank_pattern"):
        fastpeft.save(model, tmp_path, rank_pattern={}, lora_alpha=3)
