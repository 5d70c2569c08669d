"""An mPLUG with each method, and what is asked of it."""

from __future__ import annotations

import torch

import fastpeft
from fastpeft.models.mplug import DecoderCache, MPlug
from tests.methods.test_mplug import METHODS as LITERAL
from tests.models.mplug.tiny import batch, make
from tests.tiny import randomise

close = torch.testing.assert_close

METHODS = {name: method for name, method in LITERAL.items() if method is not None} | {
    "prefix, keys and values": fastpeft.PrefixTuning(3),
    "prefix, keys and values by a network": fastpeft.PrefixTuning(3, mlp=5),
    "prefix by a network": fastpeft.PrefixTuning(3, form="hidden", mlp=5),
    "lora, the FFN": fastpeft.LoRA(2, targets=("fc1", "fc2")),
    "lora, dropout": fastpeft.LoRA(2, targets=("q", "v", "fc1"), dropout=0.3),
    "prefix, lora with dropout": fastpeft.PrefixTuning(2, form="hidden")
    + fastpeft.LoRA(2, targets=("q", "k"), dropout=0.3),
    "vpt": fastpeft.VPT(3, dropout=0.3),
    "lora, classifier": fastpeft.LoRA(2) + fastpeft.Classifier(),
    "prompt, transform": fastpeft.PromptTuning(2) + fastpeft.Classifier("transform"),
    "bitfit": fastpeft.BitFit(),
    "full": fastpeft.Full(),
}
FEW = ("prompt", "prefix", "lora", "serial, cross", "parallel", "prefix and lora")


def patched(name: str, double: bool = True, scale: float = 0.3, **changes) -> MPlug:
    model = fastpeft.patch(make(**changes), METHODS[name])
    return randomise(model.double() if double else model, scale=scale)


def outputs(model: MPlug, dtype=torch.float64) -> dict[str, torch.Tensor]:
    given = batch(dtype=dtype)
    image = model.encode_image(given.images)
    memory = model.memory(image, given.ids, given.mask)
    return {
        "memory": memory.states[memory.mask],
        "logits": model.decode(given.text, given.text != 0, memory),
        "caption": model.caption_loss(given.text, memory),
        "vqa": model.vqa_loss(given.text, torch.ones(3), torch.ones(3, dtype=torch.int64), memory),
        "image route": model.caption_loss(given.text, image),
    }


def assert_same(found: dict, expected: dict, rtol=1e-9, atol=1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        close(found[name], value, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def step(model: MPlug, seed: int = 0) -> dict[str, torch.Tensor]:
    """Loss and gradients of a training step, all randomness seeded."""
    given = batch(dtype=next(model.parameters()).dtype)
    model.train()
    torch.manual_seed(seed)
    fastpeft.set_rng_state(model, seed=seed, step=0)
    memory = model.memory(model.encode_image(given.images), given.ids, given.mask)
    loss = model.caption_loss(given.text, memory)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [model.get_parameter(n) for n in names], allow_unused=True)
    return {"loss": loss.detach()} | {n: g for n, g in zip(names, grads, strict=True) if g is not None}


def greedy(model: MPlug, cached: bool, tokens: int = 6) -> torch.Tensor:
    given = batch(dtype=torch.float64)
    memory = model.memory(model.encode_image(given.images), given.ids, given.mask)
    ids, cache = torch.full((3, 1), 1), DecoderCache()
    for _ in range(tokens):
        if cached:
            logits = model.decode(ids[:, cache.length :], None, memory if cache.length == 0 else None, cache)
        else:
            logits = model.decode(ids, None, memory)
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), 1)
    assert not cached or cache.length == tokens
    return ids
