"""`patch` on models that carry peft adapters: what is fused, what is left alone, and that both give peft's results."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

import fastpeft
from fastpeft.engine.linear import project
from tests.dropin.adapted import ALL, FUSED, LEFT_ALONE, PREFIX, adapted, lora, randomise
from tests.dropin.both import assert_same, assert_same_state, assert_same_steps, pair, step
from tests.tiny import VARIANTS, images, vit

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def no_calls(monkeypatch):
    """Make peft's LoRA layers in the blocks fail when they are called, so that only fused ones pass."""

    def arm(model: nn.Module) -> None:
        for name, module in model.named_modules():
            if isinstance(module, LoraLinear) and ".blocks." in name:
                module.base_layer.__dict__["never"] = name
        forward = LoraLinear.forward

        def guarded(self, x, *args, **kwargs):
            assert "never" not in self.base_layer.__dict__, self.base_layer.never
            return forward(self, x, *args, **kwargs)

        monkeypatch.setattr(LoraLinear, "forward", guarded)

    return arm


@pytest.mark.parametrize("kind", FUSED)
def test_fused(kind, no_calls):
    options, outside = FUSED[kind]
    plain, patched = pair(adapted(lora(**options)))
    left = fastpeft.summary(patched).left_alone
    assert {path for path, _ in left} == {PREFIX + path for path in outside}
    assert all("outside of the layers" in reason for _, reason in left)
    no_calls(patched)
    assert_same_steps(plain, patched, images(dtype=torch.float64))
    assert_same_state(plain, fastpeft.unpatch(patched))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "gated_mlp"])
def test_variants(variant, no_calls):
    plain, patched = pair(adapted(lora(target_modules=ALL, modules_to_save=["head"]), variant))
    no_calls(patched)
    x = images(variant, dtype=torch.float64)
    for call in (
        lambda m, x: m(x),
        lambda m, x: m.base_model.model.forward_features(x),
        lambda m, x: m.base_model.model.forward_intermediates(x, norm=True),
    ):
        assert_same_steps(plain, patched, x, call)


def test_inside_a_gated_mlp():
    config = lora(target_modules=["qkv", "mlp.fc1", "mlp.fc2"], lora_dropout=0.2)
    assert_same_steps(*pair(adapted(config, "gated_mlp")), images("gated_mlp", dtype=torch.float64))


@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_left_alone(kind):
    config, path, reason = LEFT_ALONE[kind]
    plain, patched = pair(adapted(config), strict=kind != "saved attn")
    assert reason in dict(fastpeft.summary(patched).left_alone)[PREFIX + path]
    assert_same_steps(plain, patched, images(dtype=torch.float64))
    assert_same_state(plain, fastpeft.unpatch(patched))


class Quantised(nn.Linear):
    """A base layer with a forward of its own, whose scale depends on all rows."""

    def forward(self, x):
        scale = self.weight.abs().amax() / 7
        return nn.functional.linear(x / x.detach().abs().amax(), (self.weight / scale).round() * scale, self.bias)


def test_quantised_bases():
    model = vit(dtype=torch.float64)
    for block in model.blocks:
        block.attn.qkv.__class__ = block.mlp.fc1.__class__ = Quantised
    model = randomise(get_peft_model(model, lora(target_modules=ALL)).double())
    plain, patched = pair(model)
    left = dict(fastpeft.summary(patched).left_alone)
    assert left.keys() == {f"{PREFIX}blocks.{i}.{p}" for i in range(3) for p in ("attn.qkv", "mlp.fc1")}
    assert "its base layer is a" in left[PREFIX + "blocks.0.attn.qkv"] and "Quantised" in str(left)
    assert_same_steps(plain, patched, images(dtype=torch.float64))


def test_hooked_parts_of_a_layer():
    for part, reason in (("base_layer", "its base layer carries hooks"), ("lora_A.default", "not peft's plain layers")):
        model = adapted(lora())
        layer = model.base_model.model.blocks[1].attn.qkv
        layer.get_submodule(part).register_forward_hook(lambda m, a, out: out * 2)
        plain, patched = pair(model)
        assert reason in dict(fastpeft.summary(patched).left_alone)[PREFIX + "blocks.1.attn.qkv"]
        assert_same_steps(plain, patched, images(dtype=torch.float64))


def hot_swapped(layer: LoraLinear) -> None:
    """As `prepare_model_for_compiled_hotswap` leaves a layer."""
    layer.scaling["default"] = torch.tensor(1.5, dtype=torch.float64)


def transposed(layer: LoraLinear) -> None:
    """peft takes this back for nn.Linear when it wraps one, but the attribute decides."""
    layer.fan_in_fan_out = True


@pytest.mark.parametrize("change, reason", [(hot_swapped, "hot-swapping"), (transposed, "stored transposed")])
def test_odd_layers(change, reason):
    model = adapted(lora())
    for block in model.base_model.model.blocks:
        change(block.attn.qkv)
    plain, patched = pair(model)
    assert reason in dict(fastpeft.summary(patched).left_alone)[PREFIX + "blocks.0.attn.qkv"]
    assert_same_steps(plain, patched, images(dtype=torch.float64))


def test_scales_are_read_at_every_forward():
    plain, patched = pair(adapted(lora()))
    for scale in (0.3, 0.0):
        with rescale_adapter_scale(plain, scale), rescale_adapter_scale(patched, scale):
            assert_same_steps(plain, patched, images(dtype=torch.float64))
    assert_same_steps(plain, patched, images(dtype=torch.float64))


def test_mixed_batches():
    model = adapted(lora(target_modules=["qkv", "fc1"]))
    model.add_adapter("other", lora(target_modules=["qkv"], r=2))
    plain, patched = pair(randomise(model.double()).eval())
    x = images(dtype=torch.float64)
    names = ["default", "other", "__base__"]
    for m in (plain, patched):
        m.eval()
    expected, actual = (m(x, adapter_names=names) for m in (plain, patched))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(patched(x), plain(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.3}])
@pytest.mark.parametrize("before", [True, False], ids=["injected_then_patched", "patched_then_injected"])
def test_injected(options, before):
    def inject(model):
        torch.manual_seed(0)
        return randomise(inject_adapter_in_model(lora(target_modules=[*ALL, "head"], **options), model).double())

    plain, other = inject(vit(dtype=torch.float64)), vit(dtype=torch.float64)
    patched = fastpeft.patch(inject(other)) if before else inject(fastpeft.patch(other))
    assert list(plain.state_dict()) == list(patched.state_dict())
    assert [path for path, _ in fastpeft.summary(patched).left_alone] == ["head"]
    assert_same_steps(plain, patched, images(dtype=torch.float64))


@pytest.mark.parametrize("modules_to_save", [None, ["head"], ["attn"], ["mlp"]])
def test_adapted_after_patching(modules_to_save):
    config = lora(
        target_modules=["qkv", "fc1"][:: -1 if modules_to_save == ["attn"] else 1], modules_to_save=modules_to_save
    )
    plain = adapted(config)
    inner = fastpeft.patch(vit(dtype=torch.float64))
    patched = randomise(get_peft_model(inner, copy.deepcopy(config)).double())
    assert list(plain.state_dict()) == list(patched.state_dict())
    assert_same_steps(plain, patched, images(dtype=torch.float64))
    left = dict(fastpeft.summary(patched).left_alone)
    if modules_to_save in (["attn"], ["mlp"]):
        assert "its container was wrapped since" in left[PREFIX + "blocks.2"]
    assert fastpeft.patch(patched) is patched
    assert_same_state(plain, fastpeft.unpatch(patched))


@pytest.mark.parametrize("options", [{}, {"drop_path_rate": 0.5, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2}])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_random_masks_are_pefts(options, checkpointing):
    model = adapted(lora(target_modules=ALL, lora_dropout=0.3), **options)
    model.add_adapter("other", lora(target_modules=["qkv", "fc2"], r=2, lora_dropout=0.5))
    model.base_model.set_adapter(["default", "other"])
    model.base_model.model.set_grad_checkpointing(checkpointing)
    plain, patched = pair(randomise(model.double()))
    assert_same_steps(plain, patched, images(dtype=torch.float64))


@pytest.mark.parametrize("autocast", [False, True])
def test_random_masks_in_low_precision_are_pefts(autocast):
    config = lora(target_modules=ALL, lora_dropout=0.5, lora_alpha=64)
    model = randomise(get_peft_model(vit(dtype=torch.float32 if autocast else torch.bfloat16), config))
    plain, patched = pair(model.train())
    x = images(dtype=torch.float32 if autocast else torch.bfloat16)

    def call(model, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(x)

    expected, actual = step(plain, x, call), step(patched, x, call)
    assert torch.equal(expected["random numbers used"], actual["random numbers used"])
    # Another mask would be another function; the same one differs by rounding.
    torch.testing.assert_close(
        actual["output 0"], expected["output 0"], rtol=0.05, atol=0.05 * expected["output 0"].abs().max()
    )


def relative(found: dict, truth: dict) -> tuple[float, float]:
    """Relative errors of the output and of all gradients together."""
    names = [name for name in truth if "lora" in name]
    gradients = [torch.cat([result[name].double().flatten() for name in names]) for result in (found, truth)]
    output = (found["output 0"].double() - truth["output 0"]).norm() / truth["output 0"].norm()
    return float(output), float((gradients[0] - gradients[1]).norm() / gradients[1].norm())


@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_is_as_good_as_pefts(autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    totals = torch.zeros(2, 2)
    for seed in range(4):
        model = randomise(get_peft_model(vit(dtype=dtype, seed=seed), lora(target_modules=ALL)), seed)
        assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
        truth = step(copy.deepcopy(model).double(), images(batch=8, seed=seed, dtype=dtype).double())

        def call(model, x):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return model(x)

        results = [step(m, images(batch=8, seed=seed, dtype=dtype), call) for m in pair(model)]
        assert all(results[0][name].dtype == results[1][name].dtype for name in truth)
        totals += torch.tensor([relative(result, truth) for result in results])
    assert (totals[1] <= 2 * totals[0]).all(), totals
    assert (totals[1] < 4 * 0.1).all(), totals


@pytest.mark.parametrize("size", [1e-3, 1e-2, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("base, factors", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_the_adapters_contribution_in_low_precision(base, factors, size):
    """Adapted minus base output of one layer against float64: at most twice peft's own error."""
    layer = get_peft_model(nn.Sequential(nn.Linear(192, 256)).to(base), LoraConfig(r=8, target_modules=["0"]))
    layer = layer.base_model.model[0]
    a, b = layer.lora_A["default"].to(factors).weight, layer.lora_B["default"].to(factors).weight
    nn.init.normal_(b, std=size)
    x = torch.randn(64, 192).to(base)
    truth = layer.scaling["default"] * (x.double() @ a.double().T @ b.double().T)
    plain = layer.base_layer(x).double()
    errors = [float((y.double() - plain - truth).norm()) for y in (layer(x), project(layer, x, [256], [], 0, 1)[0])]
    assert errors[1] <= 2 * errors[0]


def test_peft_warns_no_more_than_before():
    plain, patched = pair(adapted(lora()))
    for model in (plain, patched):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(images(dtype=torch.float64)).sum().backward()


def test_compiled_in_one_graph():
    model = adapted(lora(target_modules=ALL, lora_dropout=0.3), depth=1)
    model.add_adapter("other", lora(target_modules=["fc1"]))
    plain, patched = pair(randomise(model.double()).train())
    compiled = torch.compile(patched.base_model.model, backend="eager", fullgraph=True)
    x = images(dtype=torch.float64)
    for adapter in ("default", "other"):
        plain.set_adapter(adapter), patched.set_adapter(adapter)
        assert_same(step(plain, x), step(patched, x, lambda _, x: compiled(x)))
