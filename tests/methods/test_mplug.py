"""Every method on mPLUG: the patched model against the literal one, in float64."""

from __future__ import annotations

import copy

import pytest
import torch

import fastpeft
from bench.literal.mplug import apply_to_mplug
from tests.models.mplug.tiny import batch, make

_NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0}

METHODS = {
    "none": None,
    "prompt": fastpeft.PromptTuning(3),
    "prompt, text only": fastpeft.PromptTuning(2, stacks=("text",)),
    "prompt, decoder only": fastpeft.PromptTuning(2, stacks=("decoder",)),
    "prefix": fastpeft.PrefixTuning(4, form="hidden"),
    "prefix, fusion only": fastpeft.PrefixTuning(4, form="hidden", stacks=("fusion",)),
    "lora": fastpeft.LoRA(2, alpha=3, targets=("q", "k")),
    "lora, self-attention only": fastpeft.LoRA(2, targets=("q", "k"), cross=False),
    "lora, everything": fastpeft.LoRA(2, targets=("q", "k", "v", "o")),
    "lora, one B for all heads": fastpeft.LoRA(2, targets=("q", "k"), heads="shared"),
    "lora, head by head": fastpeft.LoRA(2, targets=("q", "k"), heads="each"),
    "serial": fastpeft.SerialAdapter(6),
    "serial, cross": fastpeft.SerialAdapter(6, bias=True, locations=("attn", "cross", "ffn")),
    "parallel": fastpeft.ParallelAdapter(6),
    "parallel, its own skip": fastpeft.ParallelAdapter(6, skip=True, scale=0.5),
    "prefix and lora": fastpeft.PrefixTuning(4, form="hidden") + fastpeft.LoRA(2, targets=("q", "k", "v")),
    "prompt and serial": fastpeft.PromptTuning(2) + fastpeft.SerialAdapter(6),
}


def twins(method, seed: int = 0):
    """The literal model and the patched one, with equal tensors that are not at their start."""
    plain = make(seed, **_NO_DROPOUT).double()
    literal, patched = apply_to_mplug(copy.deepcopy(plain), method), copy.deepcopy(plain)
    fastpeft.patch(patched, method, backend="reference")
    if method is None:
        patched.requires_grad_(False)
    literal, patched = literal.double(), patched.double()
    ours = dict(patched.named_parameters())
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in literal.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn_like(parameter))
                ours[name].copy_(parameter)
    trained = [{name for name, p in model.named_parameters() if p.requires_grad} for model in (literal, patched)]
    assert trained[0] == trained[1]
    return literal, patched


def losses(model, given) -> dict[str, torch.Tensor]:
    """Everything that a training step may ask for, and the stages before."""
    image = given.tokens(model)
    text = model.encode_text(given.ids, given.mask)
    fused, both = model.fuse(text, image)
    memory = model.memory(image, given.ids, given.mask)
    answers, weights, counts = given.text[[0, 1, 1, 2]], torch.rand(4).double(), torch.tensor([1, 2, 1])
    return {
        "text": text.states[text.mask],
        "image": fused.states,
        "fused text": both.states[both.mask],
        "logits": model.decode(given.text, given.text != 0, memory)[given.text != 0],
        "caption": model.caption_loss(given.text, memory),
        "vqa": model.vqa_loss(answers, weights, counts, memory),
        "image route": model.caption_loss(given.text, model.memory(image, None, route="image")),
    }


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_patched_model_is_the_literal_one(method, training):
    assert_parity(method, training)


def assert_parity(method, training: bool) -> None:
    """Everything that a step may ask for, and its gradients, are the literal model's."""
    literal, patched = twins(method)
    for model in (literal, patched):
        model.train(training)
    given = batch(dtype=torch.float64)
    torch.manual_seed(0)
    expected = losses(literal, given)
    torch.manual_seed(0)
    found = losses(patched, given)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    if method is None:
        return
    for name in ("caption", "vqa", "image route"):
        assert found[name].requires_grad == expected[name].requires_grad
        if not expected[name].requires_grad:
            continue
        grads = []
        for model, values in ((literal, expected), (patched, found)):
            trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
            g = torch.autograd.grad(values[name], list(trained.values()), retain_graph=True, allow_unused=True)
            grads.append(dict(zip(trained, g, strict=True)))
        for tensor, want in grads[0].items():
            got = grads[1][tensor]
            if want is None or got is None:
                assert want is None or not want.any(), f"{name}: no gradient of {tensor}"
                assert got is None or not got.any(), f"{name}: a gradient of {tensor}"
                continue
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10, msg=lambda m, t=tensor: f"{t}: {m}")


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_cached_decoding_is_decoding(method):
    from fastpeft.models.mplug import DecoderCache

    _, model = twins(method)
    given = batch(dtype=torch.float64)
    memory = model.memory(given.tokens(model), given.ids, given.mask)
    whole = model.decode(given.text, None, memory)
    for cuts in ([1] * 6, [3, 2, 1], [6]):
        cache, parts = DecoderCache(), []
        for part in given.text.split(cuts, 1):
            parts.append(model.decode(part, None, memory if cache.length == 0 else None, cache))
        assert cache.length == 6
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-10)
