"""Copies of a patched model, and several users of one."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch

import fastpeft
from tests.tiny import FEW, METHODS, images, patched, vit

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(_saved(model), weights_only=False),
}


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("method", [*FEW, "vpt-share-all", "mlp-3", None])
def test_a_copy_is_the_same_function_and_its_own(method, how):
    model = fastpeft.patch(vit()) if method is None else patched(METHODS[method])
    model.eval()
    twin = COPIES[how](model)
    x = images()
    expected = model(x)
    assert torch.equal(twin(x), expected)
    assert type(twin) is type(model) and type(twin.blocks[0]) is type(model.blocks[0])
    assert {id(p) for p in twin.parameters()}.isdisjoint(id(p) for p in model.parameters())
    assert twin.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert torch.equal(model(x), expected)
    if method is not None:
        fastpeft.unpatch(twin, discard=True)
        assert type(twin) is type(vit()) and type(model) is not type(twin)
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_counts_its_own_dropout_steps(how):
    model = patched(METHODS["vpt-deep"]).train()
    fastpeft.set_rng_state(model, seed=5, step=7)
    twin = COPIES[how](model)
    # The counter is not part of the state dict, yet a copy goes on from where the model stood.
    assert fastpeft.get_rng_state(twin) == {"seed": 5, "step": 7}
    x = images()
    assert torch.equal(model(x), twin(x))
    model(x)
    assert fastpeft.get_rng_state(twin) == {"seed": 5, "step": 8}


def test_the_counter_is_not_in_the_state_dict():
    model = fastpeft.patch(vit(), METHODS["vpt-deep"])
    assert set(model.state_dict()) == set(vit().state_dict()) | {f"blocks.{i}.vpt.prompts" for i in range(3)}


@pytest.mark.parametrize("method", FEW)
def test_threads_share_a_model_in_evaluation(method):
    model = patched(METHODS[method]).eval()
    batches = [images(seed=seed, batch=1 + seed % 3) for seed in range(24)]
    with torch.no_grad():
        expected = [model(x) for x in batches]
    found = [None] * len(batches)
    failures = []

    def work(first):
        try:
            with torch.no_grad():
                for index in range(first, len(batches), 4):
                    found[index] = model(batches[index])
                    model.forward_intermediates(batches[index])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for actual, exact in zip(found, expected, strict=True):
        assert torch.equal(actual, exact)


def test_two_forwards_before_their_backwards():
    # Each keeps its own masks, whatever the counter does in between.
    model = patched(METHODS["vpt-deep"], dtype=torch.float64).train()
    x = images(dtype=torch.float64)

    def gradient(model_outputs):
        model.zero_grad()
        sum(out.sum() for out in model_outputs).backward()
        return model.blocks[0].vpt.prompts.grad.clone()

    fastpeft.set_rng_state(model, step=0)
    separate = gradient([model(x)])
    separate += gradient([model(2 * x)])
    fastpeft.set_rng_state(model, step=0)
    torch.testing.assert_close(gradient([model(x), model(2 * x)]), separate)
