"""Bytes kept for the backward pass: the right number, and no other step than without counting."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from torch.nn import functional as F

from fastpeft.trainer.loop import Loop
from fastpeft.trainer.saved import SavedBytes
from tests.tiny import METHODS, images, labels, patched
from tests.trainer.test_resume import METHOD, TRAIN, Killed, adapter_bytes, interrupt_after

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def test_each_storage_once_and_not_what_is_there_anyway():
    weight = torch.ones(4, 8, requires_grad=True)
    x = torch.ones(2, 8)
    with SavedBytes([weight]) as saved:
        y = F.linear(x, weight)
        assert saved.total == x.nbytes
        z = y.exp()
        assert saved.total == x.nbytes + z.nbytes
        # Both sides, and a view of one of them.
        kept = (z * z[:1]) + z.view(-1).square().sum()
        assert saved.total == x.nbytes + z.nbytes
    after = kept.exp()
    assert saved.total == 64 + 32 and saved.megabytes == 0.0
    after.sum().backward()
    assert weight.grad is not None


def test_nothing_is_held_afterwards():
    weight = torch.ones(4, 8, requires_grad=True)
    with SavedBytes([weight]) as saved:
        y = F.linear(torch.ones(2, 8), weight).exp()
    # What a function saves is its own result.
    graph = weakref.ref(y)
    del y
    gc.collect()
    assert saved.total and graph() is None


def test_what_is_given_back_before_the_end_is_left_out_and_its_place_counted_again():
    weight = torch.ones(64, 64, requires_grad=True)
    with SavedBytes([weight]) as saved:
        places = set()
        for _ in range(20):
            y = weight.exp()
            assert saved.total == y.nbytes
            places.add(y.data_ptr())
            del y
            assert saved.total == 0
        kept = [weight.exp() for _ in range(20)]
        # Otherwise the test shows nothing: some of these lie where the ones before were.
        assert places & {y.data_ptr() for y in kept}
    assert saved.total == 20 * weight.nbytes
    del kept
    assert saved.total == 20 * weight.nbytes


def test_what_a_pass_replaces_hides_nothing():
    for _ in range(20):
        model = torch.nn.Module()
        model.register_buffer("step", torch.zeros(64, 64))
        x = torch.ones(64, 64, requires_grad=True)
        with SavedBytes(model.buffers()) as saved:
            model.step = model.step + 1
            y = x.exp()
        assert saved.total == y.nbytes


def gradients(method: str, dtype: torch.dtype, counted: bool) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    model = patched(METHODS[method], dtype=dtype).train()
    x, own = images(dtype=dtype), (*model.parameters(), *model.buffers())
    if counted:
        with SavedBytes(own) as saved:
            loss = F.cross_entropy(model(x).float(), labels())
        assert saved.total > 0
    else:
        loss = F.cross_entropy(model(x).float(), labels())
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_the_same_bits(method, dtype):
    (loss, found), (expected_loss, expected) = (gradients(method, DTYPES[dtype], counted) for counted in (True, False))
    assert loss == expected_loss and found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def saved(out) -> float | None:
    return json.loads((out / "results.json").read_text())["saved_mb"]


def test_a_run_counts_its_first_step_and_is_no_other_run(train, write_config, tmp_path, monkeypatch):
    places = {name: tmp_path / name for name in ("whole", "cut", "uncounted")}
    configs = {}
    counted = []
    enter = SavedBytes.__enter__
    monkeypatch.setattr(SavedBytes, "__enter__", lambda self: counted.append(1) or enter(self))
    for name, out in places.items():
        with monkeypatch.context() as patch:
            configs[name] = write_config(method=METHOD, train=TRAIN | {"epochs": 2}, out=str(out))
            if name == "uncounted":
                patch.setattr(Loop, "_loss", lambda self, batch: self.work.loss(batch))
            if name == "cut":
                interrupt_after(patch, 9)
                with pytest.raises(Killed):
                    train(configs[name])
                patch.undo()
            assert train(configs[name])[0] == 0
    # Of the run that was interrupted it was kept.
    assert len(counted) == 2
    assert saved(places["whole"]) == saved(places["cut"]) > 0.1 and saved(places["uncounted"]) is None
    assert len({adapter_bytes(out) for out in places.values()}) == 1


def test_where_parameters_are_shared_out_it_is_not_counted(train, write_config, tmp_path):
    assert train(write_config(train={"zero": 3, "epochs": 2}, out=str(tmp_path / "out")))[0] == 0
    assert saved(tmp_path / "out") is None
