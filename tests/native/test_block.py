"""A block's branches as whole operators: the same step as the operators' composition, by as much as bf16 allows."""

from __future__ import annotations

import copy
import logging
import math
import re
import threading

import pytest
import torch

import fastpeft
from bench.memory import saved_bytes
from fastpeft.engine import branches
from fastpeft.engine.extensions import Bottleneck
from fastpeft.engine.stack import packs_of
from fastpeft.native import block, blocked
from tests.kernels.close import error
from tests.native.amx import BF16, needs_amx
from tests.tiny import METHODS, images, patched, vit

pytestmark = needs_amx

# Methods that leave a branch nothing but prompts, factors and adapters to train.
WHOLE = (
    "vpt-deep", "vpt-deep-batch-mask", "vpt-shallow", "vpt-first-two", "prefix-kv", "prefix-hidden", "lora-q-v",
    "lora-k", "lora-qkv", "lora-all", "serial", "serial-ffn-bias", "serial+parallel", "parallel", "parallel-skip",
    "adapter", "vpt+lora", "prefix+adapter", "vpt-first-two+prefix",
)  # fmt: skip
# Prompts in numbers that are projected as rows of their own; adapters with biases, filled up, beside factors.
MANY = {
    "parallel-bias": fastpeft.ParallelAdapter(40, bias=True, scale=0.5),
    "parallel-ffn+lora": fastpeft.ParallelAdapter(24, locations="ffn") + fastpeft.LoRA(4, targets=("q", "o")),
    "parallel+lora": fastpeft.ParallelAdapter(24) + fastpeft.LoRA(4, targets=("q", "fc2")),
    "serial+lora": fastpeft.SerialAdapter(24, bias=True) + fastpeft.LoRA(4, targets=("o", "fc2")),
    "vpt-many": fastpeft.VPT(40, dropout=0.0),
    "vpt-many-masks": fastpeft.VPT(40, dropout=0.3),
    "vpt-many-shallow": fastpeft.VPT(40, deep=False),
    "vpt-many+prefix": fastpeft.VPT(40, dropout=0.0) + fastpeft.PrefixTuning(3),
}
# Methods that train tensors of the branches' own.
OWN = {
    "full-many": fastpeft.VPT(40, dropout=0.0) + fastpeft.Full(),
    "serial+bitfit": fastpeft.SerialAdapter(24) + fastpeft.BitFit(),
    "parallel+bitfit": fastpeft.ParallelAdapter(24) + fastpeft.BitFit(),
}
TRAINED = ("full", "bitfit", "partial-2", "vpt+bitfit", "vpt+full", "lora+partial", *OWN)
# Parts of a model that are trained alone, by patterns of their names.
PARTS = ("weight", r"norm\d\.", r"norm1\.bias", r"norm2\.weight", "qkv", "proj", r"fc1\.weight", r"fc2\.bias", "fc2")
VARIANTS = ("class_token", "no_class_token", "registers", "layer_scale", "no_biases", "distilled", "oblong")
DRAWS = 6  # of what is compared in sums
ROUNDING = 2.0**-8


@pytest.fixture
def calls(monkeypatch):
    """How often each branch ran as a whole."""
    seen = {"attention": 0, "mlp": 0}

    def watch(name):
        inner = getattr(block, f"{name}_branch")

        def spy(*args):
            seen[name] += 1
            return inner(*args)

        monkeypatch.setattr(block, f"{name}_branch", spy)

    watch("attention"), watch("mlp")
    return seen


def step(model, x):
    logits = model(x)
    torch.manual_seed(5)
    (logits * torch.randn(logits.shape).to(logits.dtype)).sum().backward()
    return {"logits": logits.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def any_rows(monkeypatch):
    """Weights that are trained are packed for few rows as well."""
    monkeypatch.setattr(branches, "_MANY", 1)


def steps(method, variant, seed, memory="fast", part=None):
    """A step in float64, in bf16 by the composition, and in bf16 by whole branches."""
    model = patched((METHODS | MANY | OWN)[method], variant, seed=seed)
    if part is not None:
        for name, parameter in model.blocks.named_parameters():
            parameter.requires_grad_(re.search(part, name) is not None)
    # Weights that bf16 can hold, so that all three start from the same.
    model.to(BF16)
    found = []
    for dtype, backend in ((torch.float64, "reference"), (BF16, "reference"), (BF16, "auto")):
        twin = copy.deepcopy(model).to(dtype)
        fastpeft.patch(twin, backend=backend, memory=memory if backend == "auto" else "fast").train()
        for _, host in fastpeft.parameters.hosts(twin):
            host.fastpeft_host.backends = fastpeft.ops.choose.asked(backend) | {"prompt_attention": "reference"}
        found.append(step(twin, images(variant, seed=seed).to(BF16).to(dtype)))
    return found


@pytest.mark.parametrize("memory", ("fast", "balanced", "small"))
@pytest.mark.parametrize("method", (*WHOLE, *MANY))
def test_a_step_is_the_compositions(method, memory, calls):
    check(method, "class_token", memory)
    assert calls["attention"] and calls["mlp"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", ("vpt-deep", "lora-all"))
def test_a_step_of_other_models(method, variant, calls):
    check(method, variant, "fast")
    assert calls["attention"] and calls["mlp"]


@pytest.mark.parametrize("memory", ("fast", "balanced", "small"))
@pytest.mark.parametrize("method", TRAINED)
def test_a_step_that_trains_the_branches_own_tensors(method, memory, calls, any_rows):
    check(method, "class_token", memory)
    assert calls["attention"] and calls["mlp"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", ("full", "bitfit"))
def test_a_step_that_trains_other_models_tensors(method, variant, calls, any_rows):
    check(method, variant, "fast")
    # A LayerScale that is trained is not folded.
    whole = method == "bitfit" or variant != "layer_scale"
    assert bool(calls["attention"]) == bool(calls["mlp"]) == whole


@pytest.mark.parametrize("part", PARTS)
def test_any_part_of_a_branch_may_be_trained(part, calls, any_rows):
    check("full", "class_token", "fast", part)
    assert calls["attention"] and calls["mlp"]


@pytest.mark.parametrize("batch, whole", [(60, False), (61, True)])
def test_weights_are_packed_for_a_step_of_many_rows(batch, whole, calls):
    """1020 or 1037 rows."""
    model = fastpeft.patch(vit(dtype=BF16), METHODS["full"]).train()
    model(images(batch=batch).to(BF16))
    assert bool(calls["mlp"]) == whole


def test_what_changes_without_a_trace_is_seen(any_rows):
    """Between two steps, as some optimizers do."""
    model = fastpeft.patch(vit(dtype=BF16), METHODS["full"]).train()
    x = images().to(BF16)
    step(model, x)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    twin = fastpeft.patch(copy.deepcopy(model), backend="reference")
    assert error(model(x), twin(x).double()) < 0.05
    assert not any(packs.bytes for packs in packs_of(model))


def test_a_weight_changed_before_the_backward_pass_is_an_error(any_rows):
    model = fastpeft.patch(vit(dtype=BF16), METHODS["full"]).train()
    logits = model(images().to(BF16))
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


def ratios(method, variant, memory, draws, part=None):
    """By tensor: its error as a multiple of the composition's, in the geometric mean over draws.

    In a small random model some gradients are differences of large numbers: their error is nearly the whole of them in
    one draw and not in the next, by either way.
    """
    logarithms: dict[str, float] = {}
    for seed in range(draws):
        exact, baseline, found = steps(method, variant, seed, memory, part)
        assert found.keys() == exact.keys()
        for name, value in exact.items():
            ours, plain = error(found[name], value), error(baseline[name], value)
            ratio = math.log(max(ours, ROUNDING) / max(plain, ROUNDING))
            logarithms[name] = logarithms.get(name, 0.0) + ratio / draws
    return {name: math.exp(logarithm) for name, logarithm in logarithms.items()}


def check(method, variant, memory, part=None):
    """No systematic error in all tensors together, none in any by much more than a few draws scatter."""
    found = ratios(method, variant, memory, 5, part)
    assert math.prod(found.values()) ** (1 / len(found)) <= 1.5
    assert max(found.values()) <= 4, found


@pytest.mark.parametrize("half", (True, False))
@pytest.mark.parametrize("method", ("vpt-deep", "vpt-many-masks", "prefix-kv", "lora-all", "serial"))
def test_under_autocast(method, half, calls):
    """Weights in bf16 or fp32; the residual stream is then bf16 or fp32."""
    logarithms = []
    for seed in range(5):
        model = patched((METHODS | MANY)[method], seed=seed).to(BF16)
        x = images(seed=seed).to(BF16)
        exact = step(copy.deepcopy(model).double().train(), x.double())
        found = []
        for backend in ("reference", "auto"):
            twin = copy.deepcopy(model) if half else copy.deepcopy(model).float()
            fastpeft.patch(twin, backend=backend).train()
            with torch.autocast("cpu", BF16):
                found.append(step(twin, x if half else x.float()))
        assert found[0].keys() == found[1].keys() == exact.keys()
        for name, value in exact.items():
            assert found[1][name].dtype == found[0][name].dtype
            plain, ours = (max(error(result[name], value), ROUNDING) for result in found)
            logarithms.append(math.log(ours / plain))
    assert math.exp(sum(logarithms) / len(logarithms)) <= 1.5
    assert calls["attention"] and calls["mlp"]


@pytest.mark.parametrize("dtype", (BF16, torch.float32))
def test_gradients_without_strides(dtype):
    """What sum().backward() hands on has one number in memory."""
    model = fastpeft.patch(vit(dtype=dtype, class_token=False, global_pool=""), METHODS["lora-all"]).train()
    twin = fastpeft.patch(copy.deepcopy(model), backend="reference")
    with torch.autocast("cpu", BF16):
        for m in (model, twin):
            m.blocks(m.pos_drop(m.patch_embed(images().to(dtype)))).sum().backward()
    for (name, ours), plain in zip(model.named_parameters(), twin.parameters(), strict=True):
        if ours.grad is not None:
            assert float((ours.grad - plain.grad).abs().max()) <= 0.1 * float(plain.grad.abs().max()), name


@pytest.mark.slow
@pytest.mark.parametrize("memory", ("fast", "balanced"))
@pytest.mark.parametrize(
    "method", ("vpt-deep", "vpt-many-masks", "prefix-kv", "lora-all", "serial", "parallel", "vpt+lora")
)
def test_no_tensor_is_systematically_worse(method, memory):
    found = ratios(method, "class_token", memory, 40)
    assert max(found.values()) <= 1.5, found


@pytest.mark.parametrize("method, last", [("lora-all", ".B"), ("serial", ".up.weight"), ("parallel", ".up.weight")])
def test_what_an_adapter_adds_is_as_exact_as_the_composition(method, last):
    """Its contribution alone, adapted minus base: small beside the logits, and lost where weights are merged."""
    ours, plain = 0.0, 0.0
    for seed in range(DRAWS):
        model = patched(METHODS[method], seed=seed, scale=0.1).to(BF16)
        x = images(seed=seed).to(BF16)
        changes = []
        for dtype, backend in ((torch.float64, "reference"), (BF16, "reference"), (BF16, "auto")):
            twin = fastpeft.patch(copy.deepcopy(model).to(dtype), backend=backend).eval()
            with torch.no_grad():
                adapted = twin(x.to(dtype))
                for name, parameter in twin.named_parameters():
                    if name.endswith(last):
                        parameter.zero_()
                changes.append(adapted.double() - twin(x.to(dtype)).double())
        ours, plain = ours + error(changes[2], changes[0]), plain + error(changes[1], changes[0])
    assert ours <= 2 * plain


@pytest.mark.parametrize(
    "method, dtype, attention, mlp",
    [
        ("bitfit", BF16, 2, 3),
        ("full", BF16, 0, 0),
        ("lora-dropout", BF16, 0, 0),
        ("vpt-deep", torch.float32, 0, 0),
        # The last block has one query.
        ("vpt-deep", BF16, 2, 3),
        ("linear", BF16, 2, 3),
        ("partial-1", BF16, 2, 2),
        ("vpt+bitfit", BF16, 2, 3),
    ],
)
def test_where_branches_are_whole(method, dtype, attention, mlp, calls):
    model = fastpeft.patch(vit(dtype=dtype), METHODS[method]).train()
    step(model, images().to(dtype))
    assert (calls["attention"], calls["mlp"]) == (attention, mlp)


@pytest.mark.parametrize(
    "method, outside",
    [
        ("serial", 1),
        ("serial-ffn-bias", 0),
        ("adapter", 0),
        ("parallel", 1),
        ("parallel-ffn+lora", 0),
        ("parallel+lora", 6),
        ("parallel-skip", 3),
        ("serial+parallel", 12),
    ],
)
def test_which_adapters_run_within_their_branch(method, outside, monkeypatch):
    """Counts those that do not; the last block's attention has one query and runs by its operators."""
    seen = []
    inner = Bottleneck.forward
    monkeypatch.setattr(Bottleneck, "forward", lambda self, *args: seen.append(self) or inner(self, *args))
    model = fastpeft.patch(vit(dtype=BF16), (METHODS | MANY)[method]).train()
    model(images().to(BF16))
    assert len(seen) == outside


def test_reference_means_none(calls):
    step(fastpeft.patch(vit(dtype=BF16), METHODS["vpt-deep"], backend="reference"), images().to(BF16))
    assert calls == {"attention": 0, "mlp": 0}


def test_asked_for_by_name_and_not_possible():
    model = fastpeft.patch(vit(), METHODS["vpt-deep"])
    for _, host in fastpeft.parameters.hosts(model):
        host.fastpeft_host.backends = host.fastpeft_host.backends | {"block": "cpu"}
    with pytest.raises(fastpeft.FastPEFTError, match=r"block: cpu was asked for and cannot run .*bfloat16.*float32"):
        model(images())


def test_widths_that_do_not_fit_are_said_and_composed(caplog, calls):
    fastpeft.ops.choose.say_once.cache_clear()
    model = fastpeft.patch(vit(dtype=BF16, embed_dim=48, num_heads=2), METHODS["vpt-deep"])
    with caplog.at_level(logging.INFO, "fastpeft"):
        step(model, images().to(BF16))
    assert calls == {"attention": 0, "mlp": 0} and "widths must be multiples of 32, they are 48" in caplog.text


def test_hooks_see_every_module(calls):
    model = fastpeft.patch(vit(dtype=BF16), METHODS["vpt-deep"])
    seen = []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda *args: seen.append(args[2].shape))
    step(model, images().to(BF16))
    assert seen and calls["attention"] == 1


def test_packs_follow_changes_of_the_weights():
    model = fastpeft.patch(vit(dtype=BF16), METHODS["vpt-deep"]).eval()
    x = images().to(BF16)

    def twin():
        return fastpeft.patch(copy.deepcopy(model), backend="reference")(x)

    def changed(edit):
        with torch.no_grad():
            before = model(x)
            edit(model.blocks[0])
            assert error(twin(), before) > 0.05, "the edit does not show at all"

    def agree():
        with torch.no_grad():
            assert error(model(x), twin()) < 0.03

    changed(lambda b: b.attn.qkv.weight.mul_(1.5))
    agree()
    changed(lambda b: b.norm2.bias.add_(1.0))
    agree()
    changed(lambda b: setattr(b.mlp.fc1, "bias", torch.nn.Parameter(b.mlp.fc1.bias + 1, requires_grad=False)))
    agree()
    # Through `.data` nothing is counted: samples are looked at when the mode is set, or everything is packed again.
    changed(lambda b: b.mlp.fc2.weight.data.mul_(2))
    model.eval()
    agree()
    changed(lambda b: b.attn.proj.weight.data.mul_(-1))
    fastpeft.refresh(model)
    agree()
    with torch.no_grad():
        model.load_state_dict(vit(dtype=BF16, seed=9).state_dict(), strict=False)
    agree()


def test_packs_are_counted_and_not_copied():
    model = fastpeft.patch(vit(dtype=BF16), METHODS["vpt-deep"])
    assert fastpeft.summary(model).bytes["packed"] == 0
    step(model, images().to(BF16))
    inference = fastpeft.patch(vit(dtype=BF16), METHODS["vpt-deep"])
    with torch.no_grad():
        inference(images().to(BF16))
    # Both directions of both MLP layers and, but for the last block, of attention's; one direction for inference.
    weights = 2 * (3 * 2 * 32 * 128 + 2 * 4 * 32 * 32)
    # The first block's tokens have no gradient: its qkv is packed one way.
    assert fastpeft.summary(model).bytes["packed"] == 2 * weights - 2 * 3 * 32 * 32
    assert fastpeft.summary(inference).bytes["packed"] == weights
    assert fastpeft.summary(copy.deepcopy(model)).bytes["packed"] == 0
    assert len(packs_of(model)) == 3


def test_what_each_setting_keeps():
    def kept(memory, length):
        model = fastpeft.patch(vit(dtype=BF16, depth=5), fastpeft.VPT(length, dropout=0.0), memory=memory).train()
        x = images(batch=8).to(BF16)
        return saved_bytes(lambda: model(x), model)

    tokens = 8 * 17
    fast, balanced, small = (kept(memory, 1) for memory in ("fast", "balanced", "small"))
    # Bytes a token and unit of width: x 2, qkv 6, y 2, slopes 8 or 4. Three blocks; of the last the MLP has one row.
    rounded = blocked.blocks(tokens) * blocked.BLOCK * 32
    assert fast - balanced == 4 * (6 * rounded + 4 * rounded) + 4 * 32 * 32
    assert small < 0.3 * balanced
    # 199 prompts more in each of five blocks: themselves, keys and values, nothing a sample. The last block's
    # attention, for one query, is no whole branch: its reference copies keys and values for each of 8 samples.
    assert kept("fast", 200) - fast < 5 * 200 * 32 * 14 + 2 * 8 * (17 + 200) * 32 * 2


@pytest.mark.parametrize("memory", ("fast", "balanced", "small"))
@pytest.mark.parametrize("method", ("vpt-deep", "lora-all", "serial", "full"))
def test_a_batch_of_nothing(method, memory, calls):
    model = fastpeft.patch(vit(dtype=BF16), METHODS[method], memory=memory).train()
    assert step(model, images().to(BF16)[:0])["logits"].shape == (0, 5)
    assert calls == {"attention": 0, "mlp": 0}


def test_weights_in_fp16_under_autocast(calls, caplog):
    fastpeft.ops.choose.say_once.cache_clear()
    model = vit()
    for block_ in model.blocks:
        block_.attn.half(), block_.mlp.half()
    model = fastpeft.patch(model, METHODS["vpt-deep"])
    with torch.autocast("cpu", BF16), caplog.at_level(logging.INFO, "fastpeft"):
        model(images())
    assert calls == {"attention": 0, "mlp": 0} and "some are float16" in caplog.text


def test_a_model_made_in_inference_mode():
    with torch.inference_mode():
        model = fastpeft.patch(vit(dtype=BF16), METHODS["vpt-deep"]).eval()
        twin = fastpeft.patch(copy.deepcopy(model), backend="reference")
        x = images().to(BF16)
        assert error(model(x), twin(x).double()) < 0.03


def test_several_threads_at_once():
    models = [fastpeft.patch(vit(dtype=BF16, seed=i), METHODS["lora-all"]).train() for i in range(4)]
    x = images().to(BF16)
    expected = [step(copy.deepcopy(model), x) for model in models]
    found = [None] * 4

    def work(i):
        for _ in range(5):
            models[i].zero_grad()
            found[i] = step_alone(models[i], x)

    def step_alone(model, x):
        logits = model(x)
        logits.float().square().sum().backward()
        return logits.detach()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert torch.equal(found[i], expected[i]["logits"])
