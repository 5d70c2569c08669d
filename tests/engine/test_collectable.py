"""What nobody holds any more goes: a model, its tensors and what a step kept of them, with the last reference."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from torch import nn

import fastpeft
from bench.memory import saved_bytes
from tests.tiny import FEW, METHODS, images, patched, vit

# In bf16 the whole operators of the native library, where the CPU has what they need.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def watched(model: nn.Module) -> list[weakref.ref]:
    """The model, and its tensors: what autograd holds on to is these, without a module."""
    return [weakref.ref(one) for one in (model, *model.parameters(), *model.buffers())]


def left(watched: list[weakref.ref]) -> list[object]:
    """Those that are still there."""
    gc.collect()
    return [type(one()) for one in watched if one() is not None]


@pytest.fixture(autouse=True, scope="module")
def few_objects():
    """Collect among this module's objects, not among all that other tests and libraries have made."""
    gc.collect()
    gc.freeze()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("end", ["forward", "step", "counted", "unpatched"])
@pytest.mark.parametrize("method", [*FEW, "full", "prefix-hidden", "serial"])
def test_a_patched_model_goes_with_its_last_reference(method, end, dtype):
    model = patched(METHODS[method], dtype=DTYPES[dtype]).train()
    seen, x = watched(model), images(dtype=DTYPES[dtype])
    # A forward pass whose graph is never used, as evaluation without no_grad has it, is no reason to stay either.
    logits = model(x)
    if end == "step":
        logits.sum().backward()
    elif end == "counted":
        assert saved_bytes(functools.partial(model, x), model) > 0
    elif end == "unpatched":
        fastpeft.unpatch(model, discard=True)
    del model, logits
    assert not left(seen)


def test_a_watched_model_that_is_held_is_seen():
    """The proof that what the others find can be found: a graph is enough."""
    model = fastpeft.patch(vit(), METHODS["lora-all"])
    seen, logits = watched(model), model(images())
    del model
    assert nn.Parameter in left(seen)
    del logits
    assert not left(seen)


def test_counting_what_is_saved_keeps_nothing():
    # A function that saves its result: handed out by the hook, that would hold the graph which holds it.
    model = nn.Sequential(nn.Linear(3, 3), nn.Sigmoid(), nn.Linear(3, 2))
    seen = watched(model)
    assert saved_bytes(functools.partial(model, torch.randn(5, 3)), model) == 4 * 5 * (3 + 3)
    del model
    assert not left(seen)
