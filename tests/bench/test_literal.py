"""The literal implementations against still simpler ones: hand-written loops, timm's own model, and identities."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import fastpeft
from bench import literal
from fastpeft._compat import import_timm

timm = import_timm()

VARIANTS = {
    "plain": ("vit_tiny_patch16_224", {}),
    "no_class_token_avg": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4, "no_embed_class": True}),
    "layer_scale": ("vit_tiny_patch16_224", {"init_values": 0.1}),
    "qk_norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "pre_norm": ("vit_tiny_patch16_224", {"pre_norm": True}),
    "map_pool": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "map"}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "dynamic": ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
    "glu": ("vit_tiny_patch16_224", {"mlp_layer": timm.layers.SwiGLUPacked}),
}

ONE_OF_EACH = [
    fastpeft.VPT(3, dropout=0.0),
    fastpeft.VPT(3, deep=False, dropout=0.0),
    fastpeft.PrefixTuning(3),
    fastpeft.PrefixTuning(3, mlp=8),
    fastpeft.PrefixTuning(3, form="hidden"),
    fastpeft.LoRA(2, targets=("q", "k", "v", "o", "fc1", "fc2")),
    fastpeft.Adapter(16),
    fastpeft.SerialAdapter(8),
    fastpeft.ParallelAdapter(8, bias=True, scale=0.5),
    fastpeft.BitFit(),
    fastpeft.Partial(1),
    fastpeft.Linear(),
    fastpeft.Full(),
]


def tiny(variant="plain", depth=3):
    name, options = VARIANTS[variant]
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=48, depth=depth, embed_dim=48, num_heads=3, num_classes=5, **options)
    with torch.no_grad():
        for parameter in model.parameters():  # no zeros or ones that would hide a missing bias or scale
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.double()


def images(batch=2, size=48):
    return torch.randn(batch, 3, size, size, dtype=torch.float64)


METHOD_TENSORS = (".vpt.", ".prefix.", ".lora.", "adapter.")


def stir(model):
    """Give every method tensor a random value: several start at zero and would hide themselves."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in METHOD_TENSORS):
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "method", [fastpeft.Linear(), fastpeft.LoRA(2), fastpeft.SerialAdapter(8), fastpeft.Adapter(8)]
)
def test_starts_as_the_base_model(variant, method):
    base = tiny(variant).eval()
    model = literal.apply(copy.deepcopy(base), method)
    x = images()
    torch.testing.assert_close(model(x), base(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", ONE_OF_EACH, ids=repr)
def test_every_trainable_parameter_gets_a_gradient_and_no_other(variant, method):
    model = stir(literal.apply(tiny(variant), method))
    out = model(images())
    assert out.shape == (2, 5)
    out.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all(), name


def test_shallow_prompts_against_a_hand_written_loop():
    base = tiny().eval()
    model = stir(literal.apply(copy.deepcopy(base), fastpeft.VPT(4, deep=False))).eval()
    x = images()
    tokens = base._pos_embed(base.patch_embed(x))
    prompts = model.blocks[0].vpt.prompts.expand(2, -1, -1)
    rows = torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], dim=1)
    for block in base.blocks:
        rows = block(rows)
    expected = base.head(base.norm(rows)[:, 0])
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("depth", [None, (1, 1), (2, 3), (2, 2), (3, 4)])
def test_deep_prompts_against_a_hand_written_loop(depth):
    base = tiny("registers", depth=4).eval()
    model = stir(literal.apply(copy.deepcopy(base), fastpeft.VPT(2, depth=depth)))
    first, last = depth or (1, 4)
    x = images()
    rows = base._pos_embed(base.patch_embed(x))
    for number, block in enumerate(base.blocks, start=1):
        if first <= number <= last:
            prompts = model.blocks[number - 1].vpt.prompts.expand(2, -1, -1)
            patches = rows[:, 5:] if number == first else rows[:, 7:]
            rows = torch.cat([rows[:, :5], prompts, patches], dim=1)
        rows = block(rows)
    expected = base.head(base.norm(rows)[:, 0])
    torch.testing.assert_close(model.eval()(x), expected, rtol=1e-12, atol=1e-12)
    assert [block.vpt is not None for block in model.blocks] == [first <= n <= last for n in (1, 2, 3, 4)]


def test_average_pooling_ignores_prompts():
    base = tiny("no_class_token_avg").eval()
    model = stir(literal.apply(copy.deepcopy(base), fastpeft.VPT(4))).eval()
    x = images()
    features = model.forward_features(x)
    assert features.shape == base.forward_features(x).shape
    torch.testing.assert_close(model(x), model.head(model.fc_norm(features.mean(dim=1))), rtol=1e-12, atol=1e-12)


def test_hidden_prefix_is_deep_prompting():
    base = tiny().eval()
    prompts = stir(literal.apply(copy.deepcopy(base), fastpeft.VPT(4))).eval()
    hidden = literal.apply(copy.deepcopy(base), fastpeft.PrefixTuning(4, form="hidden")).eval()
    with torch.no_grad():
        for one, other in zip(prompts.blocks, hidden.blocks, strict=True):
            other.prefix.prompts.copy_(one.vpt.prompts)
    x = images()
    torch.testing.assert_close(hidden(x), prompts(x), rtol=1e-12, atol=1e-12)


def test_prefix_keys_and_values_against_softmax_written_out():
    base = tiny(depth=1).eval()
    model = stir(literal.apply(copy.deepcopy(base), fastpeft.PrefixTuning(3)))
    attn, prefix = model.blocks[0].attn, model.blocks[0].prefix
    h = torch.randn(1, 7, 48, dtype=torch.float64)
    q, k, v = (h @ attn.qkv.weight.T + attn.qkv.bias)[0].split(48, dim=-1)
    k, v = torch.cat([prefix.k, k]), torch.cat([prefix.v, v])
    heads = []
    for head in range(3):
        columns = slice(16 * head, 16 * head + 16)
        heads.append((q[:, columns] @ k[:, columns].T / 4).softmax(dim=-1) @ v[:, columns])
    expected = torch.cat(heads, dim=-1) @ attn.proj.weight.T + attn.proj.bias
    actual = literal.vit.attention(attn, h, prefix=prefix)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", ["plain", "glu", "qk_norm"])
def test_lora_equals_weights_with_the_product_added(variant):
    base = tiny(variant).eval()
    method = fastpeft.LoRA(2, alpha=3, targets=("q", "v", "o", "fc1", "fc2"))
    model = stir(literal.apply(copy.deepcopy(base), method))
    for plain, block in zip(base.blocks, model.blocks, strict=True):
        product = {role: 1.5 * pair.B @ pair.A for role, pair in block.lora.items()}
        plain.attn.qkv.weight.data[:48] += product["q"].data
        plain.attn.qkv.weight.data[96:] += product["v"].data
        plain.attn.proj.weight.data += product["o"].data
        plain.mlp.fc1.weight.data += product["fc1"].data
        plain.mlp.fc2.weight.data += product["fc2"].data
    x = images()
    torch.testing.assert_close(model(x), base(x), rtol=1e-10, atol=1e-10)


def test_adapter_equation():
    model = stir(literal.apply(tiny("layer_scale", depth=1), fastpeft.Adapter(16)))
    block = model.blocks[0]
    x = torch.randn(2, 7, 48, dtype=torch.float64)
    h = x + block.ls1(block.attn(block.norm1(x)))
    u = block.ls2(block.mlp(block.norm2(h)))
    up, down = block.adapter.up, block.adapter.down
    expected = h + u + up(F.gelu(down(u)))
    assert down.weight.shape == (3, 48)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("skip", [False, True])
def test_serial_and_parallel_equations(skip):
    both = fastpeft.SerialAdapter(8) + fastpeft.ParallelAdapter(4, skip=skip, scale=0.5)
    model = stir(literal.apply(tiny(depth=1), both))
    block = model.blocks[0]

    def a(module, x):
        return F.relu(x @ module.down.weight.T) @ module.up.weight.T

    x = torch.randn(2, 7, 48, dtype=torch.float64)
    h = block.norm1(x)
    f = block.attn(h)
    f = f + a(block.serial_adapter.attn, f)
    middle = x + f + 0.5 * a(block.parallel_adapter.attn, h) + skip * h
    h = block.norm2(middle)
    f = block.mlp(h)
    f = f + a(block.serial_adapter.ffn, f)
    expected = middle + f + 0.5 * a(block.parallel_adapter.ffn, h) + skip * h
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_masks_replace_random_dropout_in_training_only():
    calls = []

    def prompt_mask(index, batch):
        calls.append(index)
        return torch.zeros(batch, 3, 48, dtype=torch.float64)

    base = tiny()
    model = stir(literal.apply(copy.deepcopy(base), fastpeft.VPT(3, dropout=0.5), prompt_mask=prompt_mask)).train()
    x = images()
    masked = model(x)
    assert calls == [0, 1, 2]
    with torch.no_grad():
        for block in model.blocks:
            block.vpt.prompts.zero_()
    torch.testing.assert_close(masked, model.eval()(x), rtol=1e-12, atol=1e-12)
    assert calls == [0, 1, 2]


def test_backbone_dropout_sleeps_except_in_full_tuning():
    options = {"proj_drop_rate": 0.5, "attn_drop_rate": 0.5, "drop_path_rate": 0.5, "pos_drop_rate": 0.5}
    base = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=2, num_classes=5, **options)
    x = images().float()
    frozen = literal.apply(copy.deepcopy(base), fastpeft.LoRA(2))
    torch.testing.assert_close(frozen.train()(x), frozen.eval()(x))
    full = literal.apply(copy.deepcopy(base), fastpeft.Full()).train()
    assert not torch.equal(full(x), full(x))


def test_shared_prompts_are_one_parameter():
    model = literal.apply(tiny(), fastpeft.VPT(3, share="all"))
    prompts = [block.vpt.prompts for block in model.blocks]
    assert all(p is prompts[0] for p in prompts) and prompts[0].shape == (1, 48)
    assert literal.apply(tiny(), fastpeft.VPT(3, share="intra")).blocks[1].vpt.prompts.shape == (1, 48)


def test_mlp_head_and_frozen_head():
    model = literal.apply(tiny("distilled"), fastpeft.MLPHead(3))
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert "head.mlp.0.weight" in names and "head.mlp.6.bias" in names and "head.weight" in names
    assert all(n.startswith("head") for n in names)
    frozen = literal.apply(tiny(), fastpeft.BitFit(), train_head=False)
    assert not frozen.head.bias.requires_grad and frozen.patch_embed.proj.bias.requires_grad


def test_token_states_end_in_the_features():
    model = stir(literal.apply(tiny("registers"), fastpeft.VPT(3))).eval()
    x = images()
    states = literal.token_states(model, x)
    assert [tuple(s.shape) for s in states] == [(2, 14, 48)] * 3
    torch.testing.assert_close(model.norm(states[-1]), model.forward_features(x))


def test_what_is_not_a_plain_vit_is_named():
    post_norm = timm.create_model(
        "vit_tiny_patch16_224", img_size=48, depth=1, block_fn=timm.models.vision_transformer.ResPostBlock
    )
    with pytest.raises(TypeError, match="ResPostBlock"):
        literal.apply(post_norm, fastpeft.Linear())
