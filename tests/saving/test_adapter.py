"""Adapters on disk: what is saved comes back, and what does not fit is refused without touching the model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastpeft
from fastpeft import FastPEFTError, MethodError
from fastpeft.parameters import owners
from tests.models.mplug.tiny import make as mplug
from tests.tiny import METHODS, VARIANTS, fits, images, patched, vit

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def trained(method, variant="class_token", **options):
    """A patched model whose every trained tensor has moved."""
    model = patched(METHODS[method], variant, **options)
    with torch.no_grad():
        for parameter in fastpeft.trainable_parameters(model):
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def snapshot(model):
    return (
        type(model),
        {n: t.clone() for n, t in model.state_dict().items()},
        [p.requires_grad for p in model.parameters()],
    )


def refused(model, folder, message):
    """Loading fails with the message, and leaves the model as it was."""
    kind, state, flags = snapshot(model)
    with pytest.raises(FastPEFTError, match=message):
        fastpeft.load(model, folder)
    assert type(model) is kind and [p.requires_grad for p in model.parameters()] == flags
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


@pytest.fixture
def saved(tmp_path):
    model = trained("vpt-deep")
    fastpeft.save(model, tmp_path, base_model="vit", image_size=32, mean=[0.5] * 3, class_names=list("abcde"))
    return tmp_path


@pytest.mark.parametrize("method", METHODS)
def test_round_trip(method, tmp_path):
    model = trained(method)
    if method == "mlp-3":
        model.train()(images())
        model.eval()
    fastpeft.save(model, tmp_path)
    plain = vit()
    assert fastpeft.load(plain, tmp_path) is plain
    assert fastpeft.load(vit(), tmp_path).state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor), name
    assert torch.equal(plain.eval()(images()), model(images()))
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert flags == {n: p.requires_grad for n, p in plain.named_parameters()}
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize("method", METHODS)
def test_a_float64_model_keeps_its_last_digits(method, tmp_path):
    """What is added to it is float64 from the start, so that nothing rounds what was trained on its way back."""
    model = fastpeft.patch(vit(dtype=torch.float64), METHODS[method])
    assert {p.dtype for p in fastpeft.trainable_parameters(model)} == {torch.float64}
    assert not [name for name, t in model.state_dict().items() if t.dtype is torch.float32]
    with torch.no_grad():
        for parameter in fastpeft.trainable_parameters(model):
            parameter.copy_(0.3 * torch.randn_like(parameter))
    fastpeft.save(model, tmp_path)
    loaded = fastpeft.load(vit(dtype=torch.float64), tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    x = images(dtype=torch.float64)
    assert torch.equal(loaded.eval()(x), model.eval()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("method", ["vpt+lora", "prefix+adapter", "mlp-3"])
def test_what_is_added_to_other_models_is_fp32(method, dtype):
    model = fastpeft.patch(vit(dtype=dtype), METHODS[method])
    own = {name for name, owner in owners(model).items() if owner not in ("backbone", "head")}
    added = [t for name, t in model.state_dict().items() if name in own and t.is_floating_point()]
    assert added and {t.dtype for t in added} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prompts_that_started_from_float64_are_the_models(dtype):
    init = torch.randn(3, 4, 32, dtype=torch.float64)
    model = fastpeft.patch(vit(dtype=dtype), fastpeft.VPT(4, init=init))
    assert torch.equal(model.blocks[1].vpt.prompts, init[1].to(dtype)) and model.blocks[1].vpt.prompts.dtype is dtype


SPREAD = [(m, v) for v in VARIANTS for m in ("vpt+lora", "lora-all", "prefix+adapter", "linear") if fits(METHODS[m], v)]


@pytest.mark.parametrize("method, variant", SPREAD)
def test_round_trip_on_every_variant(method, variant, tmp_path):
    model = trained(method, variant)
    fastpeft.save(model, tmp_path)
    plain = fastpeft.load(vit(variant), tmp_path).eval()
    assert torch.equal(plain(images(variant)), model(images(variant)))


@pytest.mark.parametrize("method", ["vpt-deep", "lora-all", "linear"])
def test_only_what_was_trained_is_written(method, tmp_path):
    fastpeft.save(trained(method), tmp_path)
    written = load_file(tmp_path / WEIGHTS)
    assert len(written) == {"vpt-deep": 3, "lora-all": 3 * 4 * 2, "linear": 0}[method] + 2
    assert sum(t.numel() for t in written.values()) < 20_000


def test_a_frozen_head_is_not_written(tmp_path):
    model = fastpeft.patch(vit(), METHODS["vpt-deep"], train_head=False)
    fastpeft.save(model, tmp_path)
    assert set(load_file(tmp_path / WEIGHTS)) == {f"blocks.{i}.vpt.prompts" for i in range(3)}
    loaded = fastpeft.load(vit(), tmp_path)
    assert not loaded.head.weight.requires_grad


def with_layers(seed=3):
    """A model whose head is a BatchNorm and a linear layer."""
    model = vit()
    torch.manual_seed(seed)
    model.head = torch.nn.Sequential(torch.nn.BatchNorm1d(32), torch.nn.Linear(32, 5))
    return model


@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("method", ["vpt-deep", "lora-q-v", "bitfit"])
def test_a_head_of_several_modules(method, train_head, tmp_path):
    model = fastpeft.patch(with_layers(), METHODS[method], train_head=train_head)
    optimizer = torch.optim.SGD(fastpeft.trainable_parameters(model), lr=0.1)
    model.train()(images()).square().sum().backward()
    optimizer.step()
    fastpeft.save(model, tmp_path)
    # Another head to begin with, if the adapter brings one.
    loaded = fastpeft.load(with_layers(seed=4 if train_head else 3), tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded.eval()(images()), model.eval()(images()))
    assert all(parameter.requires_grad == train_head for parameter in loaded.head.parameters())
    refused(vit(), tmp_path, "another base")


def test_shared_prompts_are_written_once_and_come_back_shared(tmp_path):
    model = trained("vpt-share-inter")
    fastpeft.save(model, tmp_path)
    assert len([n for n in load_file(tmp_path / WEIGHTS) if ".vpt." in n]) == 1
    loaded = fastpeft.load(vit(), tmp_path)
    assert loaded.blocks[0].vpt.prompts is loaded.blocks[2].vpt.prompts


def test_prompts_that_started_from_a_tensor(tmp_path):
    model = fastpeft.patch(vit(), fastpeft.VPT(4, init=torch.randn(3, 4, 32)))
    fastpeft.save(model, tmp_path)
    loaded = fastpeft.load(vit(), tmp_path)
    assert torch.equal(loaded.blocks[1].vpt.prompts, model.blocks[1].vpt.prompts)


@pytest.mark.parametrize("dtype, masters", [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_masters_are_of_no_lower_type_and_the_base_may_be_of_another(dtype, masters, tmp_path):
    base = vit(dtype=torch.bfloat16).float()  # weights that bf16 holds exactly
    model = fastpeft.patch(base, METHODS["vpt-deep"])
    fastpeft.save(model, tmp_path)
    loaded = fastpeft.load(vit(dtype=torch.bfloat16).to(dtype), tmp_path)
    assert loaded.blocks[0].vpt.prompts.dtype == masters
    assert torch.equal(loaded.blocks[0].vpt.prompts, model.blocks[0].vpt.prompts.to(masters))


def test_metadata(saved):
    config = fastpeft.read_config(saved)
    assert config["base_model"] == "vit" and config["image_size"] == 32 and config["class_names"] == list("abcde")
    assert config["fastpeft"]["method"] == METHODS["vpt-deep"].to_dict()
    assert fastpeft.read_config(str(saved)) == config


@pytest.mark.parametrize("name", ["fastpeft", "weights_sha256", "r", "target_modules"])
def test_metadata_may_not_use_the_formats_own_names(name, tmp_path):
    with pytest.raises(FastPEFTError, match=f"must not use the names {name}"):
        fastpeft.save(trained("vpt-deep"), tmp_path, **{name: 1})


@pytest.mark.parametrize("value", [object(), float("nan"), torch.zeros(2)], ids=["object", "nan", "tensor"])
def test_metadata_that_is_no_json_leaves_the_older_adapter(value, saved):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    with pytest.raises(FastPEFTError, match="must be JSON"):
        fastpeft.save(trained("vpt-deep"), saved, extra=value)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_saving_again_replaces(saved):
    model = trained("adapter")
    fastpeft.save(model, saved)
    assert "base_model" not in fastpeft.read_config(saved)
    assert torch.equal(fastpeft.load(vit(), saved).eval()(images()), model(images()))


def test_nothing_to_save(tmp_path):
    for model in (vit(), fastpeft.patch(vit())):
        with pytest.raises(MethodError, match="carries no method to save"):
            fastpeft.save(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "other", [{"seed": 5}, {"depth": 4}, {"qk_norm": True}, {"img_size": 48}, {"variant": "registers"}], ids=str
)
def test_another_base_is_refused(other, saved):
    refused(vit(**{"variant": "class_token", **other}), saved, r"was trained on another base .*\(it names 'vit'\)")


def test_a_base_with_one_weight_edited_is_refused(saved):
    model = vit()
    model.blocks[2].mlp.fc1.weight.data[3, 4] += 0.1
    refused(model, saved, "was trained on another base")


def test_a_plainly_patched_base_is_fine(saved):
    loaded = fastpeft.load(fastpeft.patch(vit()), saved)
    assert "blocks.0.vpt.prompts" in loaded.state_dict()


def test_another_number_of_classes_says_how_many(saved):
    refused(
        vit(num_classes=7),
        saved,
        r"head\.\w+ has shape \(5.*, the model's has \(7.*create the model with num_classes=5",
    )


def test_a_model_without_a_head(saved):
    refused(vit(num_classes=0), saved, "num_classes=5|another base|unknown head")


def test_loading_onto_a_model_with_a_method(saved):
    with pytest.raises(MethodError, match="already carries a method; load an adapter into a plain model"):
        fastpeft.load(fastpeft.patch(vit(), METHODS["lora-q-v"]), saved)


def test_folders_that_are_no_adapter(tmp_path):
    refused(
        vit(), tmp_path / "nowhere", r"adapter_config\.json is not there; expected a folder written by fastpeft.save"
    )
    (tmp_path / CONFIG).write_text("[1, 2]")
    refused(vit(), tmp_path, "holds a JSON list, expected an object")
    (tmp_path / CONFIG).write_text("{")
    refused(vit(), tmp_path, "cannot be read")
    (tmp_path / CONFIG).write_bytes(b"\xff\xfe\x00")
    refused(vit(), tmp_path, "cannot be read")


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b"", lambda b: b + b"x"]
)
def test_damaged_weights(damage, saved):
    blob = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(damage(blob))
    refused(vit(), saved, f"{WEIGHTS} is damaged or belongs to another save")


def test_weights_that_are_no_safetensors(saved):
    config = fastpeft.read_config(saved)
    del config["weights_sha256"]
    (saved / CONFIG).write_text(json.dumps(config))
    (saved / WEIGHTS).write_bytes(b"not a tensor")
    refused(vit(), saved, "is not a safetensors file")


def test_a_config_alone(saved):
    (saved / WEIGHTS).unlink()
    refused(vit(), saved, f"{WEIGHTS} cannot be read: No such file")


def rewritten(folder, change_config=lambda c: None, change_tensors=lambda t: None):
    """The adapter with its content changed by somebody who knows the format."""
    config, tensors = fastpeft.read_config(folder), load_file(folder / WEIGHTS)
    change_config(config)
    change_tensors(tensors)
    del config["weights_sha256"]
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(fastpeft={"format_version": 99}), r"format version 99 is not the version 1|format version"),
        (lambda c: c.update(fastpeft=3), "format version"),
        (lambda c: c["fastpeft"].update(method={"name": "magic"}), "unknown method 'magic'"),
        (lambda c: c["fastpeft"].update(method={"name": "vpt", "length": "x"}), "length must be a positive integer"),
        (lambda c: c["fastpeft"].update(method={"name": "vpt", "length": 9}), "has shape|does not fit"),
        (lambda c: c["fastpeft"].update(method={"name": "lora"}), "lacks"),
        (lambda c: c["fastpeft"].pop("method"), r"lacks fastpeft\.method"),
        (lambda c: c["fastpeft"].pop("base_fingerprint"), r"lacks fastpeft\.base_fingerprint"),
        (lambda c: c["fastpeft"].pop("train_head"), r"lacks fastpeft\.train_head"),
        (lambda c: c.pop("fastpeft"), "its type is None"),
    ],
)
def test_a_config_that_does_not_fit(change, message, saved):
    rewritten(saved, change)
    refused(vit(), saved, message)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("blocks.1.vpt.prompts"), r"lacks blocks\.1\.vpt\.prompts"),
        (
            lambda t: t.update({"blocks.9.vpt.prompts": torch.zeros(4, 32)}),
            r"unknown blocks\.9\.vpt\.prompts|another base",
        ),
        (
            lambda t: t.update({"blocks.1.vpt.prompts": torch.zeros(4, 31)}),
            r"has shape \(4, 31\), the model's has \(4, 32\)",
        ),
        (lambda t: t.pop("head.weight"), r"lacks head\.weight|another base"),
        (lambda t: t.update({"blocks.1.attn.qkv.bias": torch.zeros(96)}), "another base|unknown|not trained"),
    ],
)
def test_tensors_that_do_not_fit(change, message, saved):
    rewritten(saved, change_tensors=change)
    refused(vit(), saved, message)


@pytest.mark.parametrize("memory", ["balanced", "small"])
def test_a_patched_base_keeps_its_settings_when_loading_fails(memory, saved):
    model = fastpeft.patch(vit(), backend="reference", memory=memory)
    rewritten(saved, change_tensors=lambda t: t.pop("blocks.1.vpt.prompts"))
    refused(model, saved, r"lacks blocks\.1\.vpt\.prompts")
    assert model.fastpeft_host.memory == memory
    assert set(model.fastpeft_host.backends.values()) == {"reference"}
    assert len(fastpeft.summary(model).fused) == 3


def test_what_the_engine_left_alone_stays_so_when_loading_fails(tmp_path):
    def base():
        model = mplug()
        model.visual_encoder.blocks[1].forward = lambda x, **options: x
        return fastpeft.patch(model, strict=False, memory="small")

    fastpeft.save(fastpeft.patch(base(), fastpeft.PrefixTuning(2)), tmp_path)
    rewritten(tmp_path, change_tensors=lambda t: t.pop("text_encoder.encoder.layer.1.prefix.k"))
    model = base()
    before = fastpeft.summary(model)
    refused(model, tmp_path, r"lacks text_encoder\.encoder\.layer\.1\.prefix\.k")
    assert fastpeft.summary(model) == before and model.fastpeft_host.memory == "small"


@pytest.mark.parametrize("tied_when_saved", [True, False])
def test_a_base_with_a_weight_under_two_names(tied_when_saved, tmp_path):
    def base(tied):
        model = vit()
        if tied:
            model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
        return model

    model = fastpeft.patch(base(tied_when_saved), fastpeft.VPT(2)).eval()
    fastpeft.save(model, tmp_path)
    if tied_when_saved:
        assert torch.equal(fastpeft.load(base(True), tmp_path).eval()(images()), model(images()))
    refused(base(not tied_when_saved), tmp_path, "another base")
