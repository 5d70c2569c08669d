"""A post-LayerNorm block whose layers are packed and which attends to a memory without its keys and values.

One block of each of mPLUG's stacks in bf16, with gradients, is as exact as the literal one.
"""

from __future__ import annotations

import copy

import pytest
import torch

import fastpeft
from bench.literal.mplug import apply_to_mplug
from fastpeft.engine import packed
from fastpeft.native import block
from fastpeft.native.vector import prompt_attention
from tests.kernels.close import error
from tests.models.mplug.tiny import make
from tests.native.amx import BF16, needs_amx

pytestmark = needs_amx

# Heads as wide as it takes for a memory's keys and values not to be made: 7 M H < 4 d.
SIZES = {"width": 64, "num_heads": 1, "intermediate": 128, "dropout": 0.0, "attention_dropout": 0.0}
# Whether a unit of an adapter is on may be decided by rounding, in either implementation: many rows, a few draws.
DRAWS = 6
LENGTHS = [9, 4, 6] * 16
# A block, and whether it attends to a memory.
BLOCKS = {
    "text": ("text_encoder.encoder.layer.1", False),
    "fusion": ("fusion_encoder.encoder.layer.5", True),
    "decoder": ("text_decoder.bert.encoder.layer.1", True),
}
METHODS = {
    "prefix": fastpeft.PrefixTuning(4, form="hidden"),
    "lora": fastpeft.LoRA(4, targets=("q", "k")),
    "lora, everything": fastpeft.LoRA(4, targets=("q", "k", "v", "o")),
    "serial": fastpeft.SerialAdapter(24, bias=True, locations=("attn", "cross", "ffn")),
    "parallel": fastpeft.ParallelAdapter(24, locations=("attn", "cross", "ffn")),
}


@pytest.fixture
def calls(monkeypatch):
    """How often a block's parts ran packed; for attention to a memory, whether its backward pass gave one gradient."""
    seen = {"linear": 0, "mlp_branch": 0, "memory_attention": [], "one_memory": 0}

    def watch(module, name, note):
        inner = getattr(module, name)

        def spy(*args, **options):
            note(args, options)
            return inner(*args, **options)

        monkeypatch.setattr(module, name, spy)

    def add(name):
        seen[name] += 1

    watch(block, "linear", lambda *_: add("linear"))
    watch(block, "mlp_branch", lambda *_: add("mlp_branch"))
    watch(packed, "memory_attention", lambda args, _: seen["memory_attention"].append(args[9]))
    watch(prompt_attention, "backward", lambda _, options: options.get("one_memory") and add("one_memory"))
    return seen


def models(method, seed):
    """The literal model in float64 and in bf16, and the patched one in bf16, with equal tensors."""
    plain = make(seed, **SIZES).to(BF16)
    literal, ours = apply_to_mplug(copy.deepcopy(plain), method), fastpeft.patch(copy.deepcopy(plain), method)
    named = dict(ours.named_parameters())
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in literal.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn_like(parameter))
                named[name].copy_(parameter)
    return [model.train() for model in (copy.deepcopy(literal).double(), literal, ours)]


def given(seed, stack):
    """What a layer is called with: texts, most of them padded, and for a decoder a padded memory."""
    torch.manual_seed(seed + 2)
    lengths = torch.tensor(LENGTHS)[:, None]
    x, memory, weight = (torch.randn(len(LENGTHS), rows, 64) for rows in (6, 9, 6))
    mask = torch.arange(6) < lengths
    options = {
        "text": {"mask": mask},
        "fusion": {"mask": mask},
        "decoder": {"causal": True, "memory_mask": torch.arange(9) < lengths},
    }[stack]
    return [t.to(BF16) for t in (x, memory, weight)], options


def run(model, path, cross, tensors, options):
    """Output, gradients of the inputs and of what the block trains."""
    layer = model.get_submodule(path)
    dtype = layer.output.dense.weight.dtype
    x, memory, weight = (t.to(dtype) for t in tensors)
    inputs = {"x": x.requires_grad_(), **({"memory": memory.requires_grad_()} if cross else {})}
    y = layer(x, **options, **({"memory": memory} if cross else {}))
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((y * weight).sum(), [*inputs.values(), *trained.values()])
    return {"y": y.detach()} | dict(zip([*inputs, *trained], found, strict=True))


@pytest.mark.parametrize(
    "stack", ["decoder", *(pytest.param(stack, marks=pytest.mark.slow) for stack in ("text", "fusion"))]
)
@pytest.mark.parametrize("name", METHODS)
def test_a_block_is_as_exact_as_the_literal_one(name, stack, calls):
    path, cross = BLOCKS[stack]
    ours, plain = {}, {}
    for seed in range(DRAWS):
        tensors, options = given(seed, stack)
        exact, literal, found = (run(model, path, cross, tensors, options) for model in models(METHODS[name], seed))
        assert found.keys() == literal.keys() == exact.keys()
        for tensor, value in exact.items():
            ours[tensor] = ours.get(tensor, 0.0) + error(found[tensor], value) / DRAWS
            plain[tensor] = plain.get(tensor, 0.0) + error(literal[tensor], value) / DRAWS
    wrong = {tensor: (ours[tensor], plain[tensor]) for tensor in ours if not ours[tensor] <= 2 * plain[tensor]}
    assert not wrong, "relative errors (ours, literal), means over draws"
    # Every product of the block, and the memory's keys and values nowhere.
    assert calls["mlp_branch"] == DRAWS and calls["linear"] == DRAWS * (4 if cross else 2)
    lengths = calls["memory_attention"]
    assert len(lengths) == calls["one_memory"] == DRAWS * cross
    if stack == "decoder":
        assert [one.tolist() for one in lengths] == [LENGTHS] * DRAWS
