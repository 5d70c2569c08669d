"""Everything that peft can do with its adapters still works on a patched model, with the same results."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

import fastpeft
from fastpeft.engine import branches
from fastpeft.engine.post_norm import block_run
from fastpeft.native import packs
from tests.dropin.adapted import ALL, PREFIX, adapted, lora, randomise
from tests.dropin.both import assert_same_state, assert_same_steps, pair, step
from tests.tiny import images, vit

pytestmark = pytest.mark.filterwarnings("ignore")
X = images(dtype=torch.float64)


def two(**options) -> PeftModel:
    """A model with two adapters on different layers, "default" active."""
    model = adapted(lora(target_modules=ALL, modules_to_save=["head"], **options))
    model.add_adapter("other", lora(target_modules=["qkv", "fc2"], r=2, lora_alpha=5, **options))
    return randomise(model.double())


def add_third(model: PeftModel) -> None:
    """Add an adapter, as a user does between two trainings."""
    torch.manual_seed(3)
    model.add_adapter("third", lora(target_modules=["attn.proj", "fc1"], r=3))
    model.set_adapter("third")
    randomise(model.double(), seed=4)


def add_dora(model: PeftModel) -> None:
    """Add an adapter that is not fused, on some of the layers."""
    torch.manual_seed(3)
    model.add_adapter("dora", lora(target_modules=["qkv", "fc1"], use_dora=True))
    randomise(model.double(), seed=4)


def combine(model: PeftModel) -> None:
    """Build an adapter from the two that are there."""
    torch.manual_seed(3)
    model.add_adapter("same", lora(target_modules=ALL))
    randomise(model.double(), seed=4)
    model.add_weighted_adapter(["default", "same"], [0.3, 0.6], "sum", combination_type="linear")
    model.set_adapter("sum")
    model.double()


def merged_and_disabled(model: PeftModel) -> None:
    """peft unmerges inside a forward with disabled adapters."""
    model.merge_adapter()
    with model.disable_adapter():
        step(model, X)


def unpatch_and_patch(model: PeftModel) -> None:
    """On the patched model only: there and back."""
    if fastpeft.summary(model).fused:
        fastpeft.patch(fastpeft.unpatch(model))


OPERATIONS: dict[str, list[Callable[[PeftModel], object]]] = {
    "set_adapter": [lambda m: m.set_adapter("other"), lambda m: m.set_adapter("default")],
    "several active": [
        lambda m: m.base_model.set_adapter(["default", "other"]),
        lambda m: m.base_model.set_adapter(["other", "default"]),
    ],
    "add_adapter": [add_third, lambda m: m.base_model.set_adapter(["default", "third"])],
    "add an adapter that is not fused": [
        add_dora,
        lambda m: m.set_adapter("dora"),
        lambda m: m.base_model.set_adapter(["dora", "other"]),
        lambda m: m.set_adapter("other"),
        lambda m: m.delete_adapter("dora"),
    ],
    "delete_adapter": [
        lambda m: m.set_adapter("other"),
        lambda m: m.delete_adapter("default"),
        add_third,
        lambda m: m.delete_adapter("other"),
    ],
    "merge": [
        lambda m: m.merge_adapter(),
        lambda m: m.unmerge_adapter(),
        lambda m: m.merge_adapter(adapter_names=["other"]),
        lambda m: m.unmerge_adapter(),
        lambda m: m.merge_adapter(safe_merge=True),
        lambda m: m.set_adapter("other"),
    ],
    "merged and disabled": [merged_and_disabled],
    "weighted adapters": [combine, lambda m: m.delete_adapter("same")],
    "requires_grad": [
        lambda m: m.requires_grad_(False),
        lambda m: m.base_model.model.blocks[1].requires_grad_(True),
        lambda m: m.requires_grad_(True),
    ],
    "disabled layers": [
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.base_model.enable_adapter_layers(),
    ],
    "single precision": [lambda m: m.float().double()],
    "unpatch": [unpatch_and_patch, lambda m: m.set_adapter("other"), unpatch_and_patch],
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name):
    plain, patched = pair(two())
    for operation in OPERATIONS[name]:
        for model in (plain, patched):
            operation(model)
        assert list(plain.state_dict()) == list(patched.state_dict())
        assert_same_steps(plain, patched, X)
        assert_same_state(plain, patched)


def test_disable_adapter():
    plain, patched = pair(two(lora_dropout=0.2))
    base = vit(dtype=torch.float64)
    before = step(patched.eval(), X)["output 0"]
    with plain.disable_adapter(), patched.disable_adapter():
        assert_same_steps(plain, patched, X)
        torch.testing.assert_close(patched.eval()(X), base.eval()(X), rtol=1e-10, atol=1e-10)
    assert_same_steps(plain, patched, X)
    torch.testing.assert_close(step(patched.eval(), X)["output 0"], before)


@pytest.mark.parametrize("ending", ["merge_and_unload", "unload"])
@pytest.mark.parametrize("active", ["default", ["default", "other"]])
def test_unloading(ending, active):
    plain, patched = pair(two())
    for model in (plain, patched):
        model.base_model.set_adapter(active)
    plain, patched = getattr(plain, ending)(), getattr(patched, ending)()
    assert_same_state(plain, patched)
    assert_same_steps(plain, patched, X)
    assert len(fastpeft.summary(patched).fused) == 3 and fastpeft.summary(patched).left_alone == []
    assert fastpeft.patch(patched) is patched
    fastpeft.unpatch(patched)
    assert [type(m) for m in plain.modules()] == [type(m) for m in patched.modules()]
    assert_same_steps(plain, patched, X)
    assert len(fastpeft.summary(fastpeft.patch(patched, fastpeft.VPT(2))).fused) == 3


def train(model: nn.Module, steps: int = 3) -> list[float]:
    """A few steps of AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    torch.manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model.train()(X), torch.arange(len(X)))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_training():
    plain, patched = pair(two(lora_dropout=0.3))
    assert train(plain) == pytest.approx(train(patched), rel=1e-9)
    for (name, expected), (_, actual) in zip(plain.named_parameters(), patched.named_parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_save_pretrained(tmp_path):
    plain, patched = pair(two())
    for model, name in ((plain, "plain"), (patched, "patched")):
        model.save_pretrained(tmp_path / name)
    for folder in ("", "other"):
        configs = [
            json.loads((tmp_path / n / folder / "adapter_config.json").read_text()) for n in ("plain", "patched")
        ]
        for config in configs:
            config["target_modules"].sort()  # peft keeps a set
        assert configs[0] == configs[1]
        weights = [load_file(tmp_path / n / folder / "adapter_model.safetensors") for n in ("plain", "patched")]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    fresh = PeftModel.from_pretrained(vit(dtype=torch.float64), tmp_path / "patched", is_trainable=True)
    fresh.load_adapter(tmp_path / "patched" / "other", "other", is_trainable=True)
    late = PeftModel.from_pretrained(fastpeft.patch(vit(dtype=torch.float64)), tmp_path / "patched", is_trainable=True)
    late.load_adapter(tmp_path / "patched" / "other", "other", is_trainable=True)
    for adapter in ("default", "other"):
        for model in (patched, fresh, late):
            model.set_adapter(adapter)
            model.double()
        assert_same_steps(fresh, patched, X, tolerance=1e-6)
        assert_same_steps(fresh, late, X)


def test_peft_state_dicts():
    plain, patched = pair(two())
    expected, actual = get_peft_model_state_dict(plain), get_peft_model_state_dict(patched)
    assert list(expected) == list(actual)
    set_peft_model_state_dict(patched, {name: value * 2 for name, value in actual.items()})
    set_peft_model_state_dict(plain, {name: value * 2 for name, value in expected.items()})
    assert_same_steps(plain, patched, X)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied):
    plain, patched = pair(two(lora_dropout=0.2))
    other = copied(patched)
    assert len(fastpeft.summary(other).fused) == 3
    assert_same_steps(plain, other, X)
    other.set_adapter("other")
    assert_same_steps(plain, patched, X)


def test_edited_weights_are_seen():
    plain, patched = pair(two())
    for model in (plain, patched):
        step(model, X)
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "qkv.base_layer" in name:
                parameter.data = parameter.data * 1.5
            elif "lora_B" in name:
                parameter.data.add_(0.1)
    assert_same_steps(plain, patched, X)
    patched.load_state_dict({name: value * 0.5 for name, value in plain.state_dict().items()})
    plain.load_state_dict({name: value * 0.5 for name, value in plain.state_dict().items()})
    assert_same_steps(plain, patched, X)


def test_a_method_on_top_of_an_adapter():
    """peft's factors are part of the frozen backbone then, and come back as they were. Its head is the head."""
    model = two()
    patched = fastpeft.patch(copy.deepcopy(model), fastpeft.VPT(4, dropout=0.0))
    trained = {name for name, p in patched.named_parameters() if p.requires_grad}
    saved = f"{PREFIX}head.modules_to_save.default."
    assert {name for name in trained if ".vpt." not in name} == {f"{saved}weight", f"{saved}bias"}
    assert all(name.endswith(".vpt.prompts") for name in trained if not name.startswith(saved))
    with torch.no_grad():
        assert not torch.equal(patched.eval()(X), model.eval()(X))
    fastpeft.unpatch(patched, discard=True)
    assert_same_state(model, patched)
    assert_same_steps(model, patched, X)


def test_a_head_of_which_peft_trains_nothing():
    model = two().requires_grad_(False)
    with pytest.raises(
        fastpeft.MethodError, match=r"head is a peft\..*ModulesToSaveWrapper that trains nothing; .*train_head=False"
    ):
        fastpeft.patch(model, fastpeft.VPT(4))
    assert not fastpeft.summary(model).fused
    assert set(fastpeft.parameter_groups(fastpeft.patch(model, fastpeft.VPT(4), train_head=False))) == {"vpt"}


def test_what_is_packed_follows_what_peft_merges(monkeypatch):
    """peft edits `weight.data` in place. A copy of the weight stands here for what a backend packs of it."""
    monkeypatch.setattr(packs, "_layer", lambda weights, *rest: weights[0].clone())
    model = fastpeft.patch(two()).eval()
    block = model.base_model.model.blocks[1]

    def packed():
        return branches.packer(block_run(block), packs)("qkv", branches.layers_of(block_run(block), ("qkv",)), None)

    def weight():
        return block.attn.qkv.get_parameter("base_layer.weight" if hasattr(block.attn.qkv, "base_layer") else "weight")

    base = packed()
    assert torch.equal(base, weight()) and packed() is base, "it is made once"
    changes = (
        model.merge_adapter,
        model.unmerge_adapter,
        lambda: model.merge_adapter(adapter_names=["other"]),
        lambda: model.merge_adapter(adapter_names=["default"]),
        model.unmerge_adapter,
        model.merge_and_unload,
    )
    for change in changes:
        before, place = weight().clone(), weight().data_ptr()
        change()
        assert weight().data_ptr() == place and not torch.equal(weight(), before)
        assert torch.equal(packed(), weight())


def test_names_in_the_summary():
    patched = fastpeft.patch(two())
    text = str(fastpeft.summary(patched))
    assert "fused       3 blocks: attention + mlp" in text
    assert f"left alone  {PREFIX}head: a peft.utils.other.ModulesToSaveWrapper, outside of the layers" in text
