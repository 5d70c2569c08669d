"""Several sets of prompts in one pass against one pass each."""

from __future__ import annotations

import pytest
import torch

import fastpeft
from fastpeft.engine.block import BlockRun
from fastpeft.engine.extensions import PromptBank
from tests.tiny import CLASSES, SIZE, vit

METHODS = {
    "deep": fastpeft.VPT(3),
    "many": fastpeft.VPT(40),
    "shallow": fastpeft.VPT(3, deep=False),
    "first blocks": fastpeft.VPT(2, depth=(1, 2)),
    "last blocks": fastpeft.VPT(2, depth=(2, 3)),
    "shared within": fastpeft.VPT(3, share="intra"),
    "shared between": fastpeft.VPT(3, share="inter"),
}


def members(folder, method, count=5, variant="class_token", **options):
    """Saved adapters with random prompts and heads, and their models."""
    models = []
    for seed in range(count):
        torch.manual_seed(seed)
        model = fastpeft.patch(vit(variant, **options), method)
        with torch.no_grad():
            for parameter in fastpeft.trainable_parameters(model):
                parameter.copy_(torch.randn_like(parameter))
        fastpeft.save(model, folder / str(seed))
        models.append(model.eval())
    return models, [folder / str(seed) for seed in range(count)]


def images(count=4, seed=0):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_one_pass_is_five_passes(name, backend, tmp_path):
    models, folders = members(tmp_path, METHODS[name])
    one = fastpeft.PromptEnsemble(vit(), folders, backend)
    x = images()
    each = torch.stack([model(x) for model in models])
    got = one(x)
    assert got.shape == (5, 4, CLASSES)
    assert (each[0] - each[1]).abs().max() > 0.1, "members differ"
    torch.testing.assert_close(got, each, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        one(images(3, seed=1)), torch.stack([m(images(3, seed=1)) for m in models]), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("variant", ["average_pool", "registers", "layer_scale", "qk_norm", "distilled", "gated_mlp"])
@torch.no_grad()
def test_other_backbones(variant, tmp_path):
    models, folders = members(tmp_path, fastpeft.VPT(3), 2, variant)
    one = fastpeft.PromptEnsemble(vit(variant), folders)
    torch.testing.assert_close(one(images()), torch.stack([m(images()) for m in models]), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_half_precision_errs_no_more_than_single_passes(tmp_path):
    models, folders = members(tmp_path, fastpeft.VPT(40), embed_dim=64, num_heads=2)
    one = fastpeft.PromptEnsemble(vit(embed_dim=64, num_heads=2), folders).to(torch.bfloat16)
    x = images(8)
    exact = torch.stack([m(x) for m in models])
    separate = torch.stack([m.to(torch.bfloat16)(x.bfloat16()) for m in models])
    error, usual = ((one(x.bfloat16()) - exact).norm(), (separate - exact).norm())
    assert error < 2 * usual


@torch.no_grad()
def test_what_does_not_depend_on_the_prompts_is_computed_once(tmp_path):
    _, folders = members(tmp_path, fastpeft.VPT(2, depth=(2, 3)))
    one = fastpeft.PromptEnsemble(vit(), folders)
    seen = []
    for block in one.model.blocks:
        block.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    one(images())
    assert seen == [4, 20, 20]
    banks = [module for module in one.modules() if isinstance(module, PromptBank)]
    assert len(banks) == 2 and all(bank.prompts.shape == (5, 2, 32) for bank in banks)


@torch.no_grad()
def test_the_banks_keys_are_projected_once_a_batch(tmp_path, monkeypatch):
    _, folders = members(tmp_path, fastpeft.VPT(2))
    one = fastpeft.PromptEnsemble(vit(), folders, "reference")
    seen = []
    whole = BlockRun._prompt_keys_values
    monkeypatch.setattr(BlockRun, "_prompt_keys_values", lambda run, p: seen.append(p.shape) or whole(run, p))
    one(images())
    assert seen == [(5, 2, 32)] * 3


def test_what_makes_no_ensemble(tmp_path):
    _, (vpt,) = members(tmp_path / "a", fastpeft.VPT(3), 1)
    _, (longer,) = members(tmp_path / "b", fastpeft.VPT(4), 1)
    _, (lora,) = members(tmp_path / "c", fastpeft.LoRA(2), 1)
    model = vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "head" not in name}
    for folders, message in (
        ([], "at least one adapter"),
        ([vpt, longer], "they make no ensemble"),
        ([lora], "an ensemble is made of VPT alone"),
        ([tmp_path / "none"], "none"),
    ):
        with pytest.raises(fastpeft.FastPEFTError, match=message):
            fastpeft.PromptEnsemble(model, folders)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    with pytest.raises(fastpeft.FastPEFTError, match="another base"):
        fastpeft.PromptEnsemble(vit(seed=1), [vpt])
    with pytest.raises(fastpeft.MethodError, match="train its members"):
        fastpeft.PromptEnsemble(model, [vpt]).train()


def test_heads_of_several_layers_are_refused(tmp_path):
    def deep(seed):
        model = vit()
        torch.manual_seed(seed)
        model.head = torch.nn.Sequential(torch.nn.Linear(32, 8), torch.nn.ReLU(), torch.nn.Linear(8, CLASSES))
        return model

    fastpeft.save(fastpeft.patch(deep(0), fastpeft.VPT(3)), tmp_path / "deep")
    with pytest.raises(fastpeft.MethodError, match=r"have linear heads, .*deep is of Sequential"):
        fastpeft.PromptEnsemble(deep(1), [tmp_path / "deep"])


def test_what_is_no_image_transformer_is_a_line(tmp_path):
    """An mPLUG holds an image tower beside its own blocks; a wrapped transformer is not the model."""
    from tests.models.mplug.tiny import make

    model = fastpeft.patch(make(), fastpeft.VPT(3, stacks="image"))
    fastpeft.save(model, tmp_path / "mplug")
    plain = make()
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    with pytest.raises(fastpeft.MethodError) as caught:
        fastpeft.PromptEnsemble(plain, [tmp_path / "mplug"])
    said = str(caught.value)
    assert "\n" not in said and "got MPlug with 2 (the model itself, visual_encoder" in said
    assert not [name for name in plain.state_dict() if "vpt" in name]
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())
    wrapped = torch.nn.Sequential(fastpeft.patch(vit(), fastpeft.VPT(3)))
    fastpeft.save(wrapped, tmp_path / "wrapped")
    with pytest.raises(fastpeft.MethodError, match=r"got Sequential with 1 \(0\)"):
        fastpeft.PromptEnsemble(torch.nn.Sequential(vit()), [tmp_path / "wrapped"])
