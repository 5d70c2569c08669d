"""What lies before the first trainable parameter is a constant per image: computed apart, nothing changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastpeft
from tests.tiny import METHODS, VARIANTS, fits, images, labels, patched, vit
from tests.twins import step

STARTS = {
    "full": None,
    "bitfit": None,  # the patch embedding's bias
    "class-token": None,
    "vpt+bitfit": None,
    "vpt+full": None,
    "bitfit+mlp": None,
    "linear": "the whole backbone",
    "vpt-fixed": "the whole backbone",
    "mlp-3": "the whole backbone",
    "partial-1": "blocks 0..1",
    "partial-2": "blocks 0..0",
    "vpt-last-two": "blocks 0..0",
    "vpt-middle": "blocks 0..0",
}


_POOLS = ("class_token", "map_pool", "distilled")


@pytest.mark.parametrize("variant, method", [(v, m) for v in _POOLS for m in METHODS if fits(METHODS[m], v)])
def test_decoding_features_is_the_forward(variant, method):
    model, x = patched(METHODS[method], variant, dtype=torch.float64).train(), images(variant, dtype=torch.float64)
    prefix = fastpeft.frozen_prefix(model)
    expected = STARTS.get(method, "the embedding of the patches")
    assert (prefix.description if prefix else None) == expected
    if prefix is None:
        return
    features = prefix.encode(x)
    assert not features.requires_grad
    if expected == "the whole backbone":
        assert features.ndim == (3 if variant == "distilled" else 2), "what the head reads, not rows to pool"
    assert model.training and features.shape[0] == 3
    for training in (True, False):
        model.train(training)
        fastpeft.set_rng_state(model, seed=1, step=0)
        whole = step(model, x)
        model.zero_grad()
        fastpeft.set_rng_state(model, seed=1, step=0)
        parts = step(_Decoding(model, prefix), features)
        for name, tensor in whole.items():
            torch.testing.assert_close(parts[name], tensor, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        model.zero_grad()


class _Decoding:
    """The decoder on features, with the whole model's parameters under their own names."""

    def __init__(self, model, prefix):
        self.model, self.prefix = model, prefix

    def __call__(self, features):
        return self.prefix.decoder(features)

    def __getattr__(self, name):
        return getattr(self.model, name)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if fits(METHODS["linear"], v)])
def test_a_frozen_backbone_gives_what_the_head_reads(variant):
    model, x = patched(METHODS["linear"], variant).eval(), images(variant)
    prefix = fastpeft.frozen_prefix(model)
    assert prefix.description == "the whole backbone"
    torch.testing.assert_close(prefix.decoder(prefix.encode(x)), model(x))


def test_training_on_features_trains_the_model_itself():
    model = patched(METHODS["linear"]).train()
    prefix = fastpeft.frozen_prefix(model)
    features = prefix.encode(images())
    optimizer = torch.optim.SGD(fastpeft.trainable_parameters(model), lr=0.1)
    before = model(images()).detach()
    F.cross_entropy(prefix.decoder(features), labels()).backward()
    optimizer.step()
    after = model.eval()(images())
    assert not torch.allclose(after, before)
    torch.testing.assert_close(prefix.decoder(features), after)


def test_frozen_layers_of_a_plain_patch():
    model = fastpeft.patch(vit().requires_grad_(False))
    model.blocks[1].attn.requires_grad_(True)
    assert fastpeft.frozen_prefix(model).description == "blocks 0..0"
    model.patch_embed.proj.bias.requires_grad_(True)
    assert fastpeft.frozen_prefix(model) is None
    model = fastpeft.patch(vit().requires_grad_(False))
    model.norm.weight.requires_grad_(True)
    assert fastpeft.frozen_prefix(model).description == "all blocks"


@pytest.mark.parametrize(
    "rate", ["proj_drop_rate", "drop_path_rate", "patch_drop_rate", "pos_drop_rate", "attn_drop_rate"]
)
def test_a_backbone_that_drops_out_is_no_constant(rate):
    plain = fastpeft.patch(vit(**{rate: 0.3}).requires_grad_(False))
    plain.head.requires_grad_(True)
    assert fastpeft.frozen_prefix(plain) is None
    # A method puts the backbone to rest, so there it is one.
    asleep = fastpeft.patch(vit(**{rate: 0.3}), METHODS["linear"]).train()
    prefix = fastpeft.frozen_prefix(asleep)
    torch.testing.assert_close(prefix.decoder(prefix.encode(images())), asleep(images()))


def test_models_that_are_not_a_patched_transformer_have_none():
    assert fastpeft.frozen_prefix(vit()) is None
    assert fastpeft.frozen_prefix(torch.nn.Sequential(patched(METHODS["linear"]))) is None


def test_encoding_keeps_the_training_mode():
    model = patched(METHODS["vpt-last-two"])
    for training in (True, False):
        model.train(training)
        state = [module.training for module in model.modules()]
        fastpeft.frozen_prefix(model).encode(images())
        assert [module.training for module in model.modules()] == state
