"""Recorded steps, with a recorder for the CPU that replays torch's operations into the memory that they first wrote."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import fastpeft
from fastpeft.trainer.graph import StepGraph
from tests.tiny import METHODS, images, labels, patched


class Recorder(TorchDispatchMode):
    """Operations with their operands by identity: a replay reads and writes the same memory, as a CUDA graph does."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        self.operations.append((function, args, kwargs, out))
        return out

    def replay(self):
        with torch.no_grad():
            for function, args, kwargs, out in self.operations:
                again = function(*args, **kwargs)
                for old, new in zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Momentum(torch.optim.Optimizer):
    """Whose step reads no number on the host, as torch's own optimizers do on a GPU with `capturable`."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                buffer = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
                buffer.mul_(0.9).add_(parameter.grad)
                parameter.sub_(group["lr"] * buffer)


def record(function):
    """Record on a copy of the world: recording itself has no effect, as on a GPU."""
    tensors = [t for t in RESTORED() if isinstance(t, torch.Tensor)]
    before = [t.detach().clone() for t in tensors]
    recorder = Recorder()
    with torch.random.fork_rng(devices=[]), recorder:
        result = function()
    with torch.no_grad():
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
    return recorder.replay, result


RESTORED = list


def training(method, capture=None):
    """Model, and a function that takes a step on inputs and returns the loss."""
    global RESTORED
    torch.manual_seed(0)
    # In float64, in which no rounding turns a ReLU of the deep head over: its steps are far from smooth.
    model = patched(METHODS[method]).double().train()
    fastpeft.set_rng_state(model, seed=7, step=0, rank=0)
    trained = fastpeft.trainable_parameters(model)
    rate = torch.tensor(1e-3, dtype=torch.float64)
    optimizer = Momentum(trained, rate)
    clock = model.fastpeft_host.clock

    def compute(x, y):
        loss = F.cross_entropy(model(x), y, reduction="sum")
        loss.backward()
        return loss.detach()

    if capture is None:

        def step(x, y):
            loss = compute(x, y)
            optimizer.step()
            optimizer.zero_grad()
            return loss

        return model, step, rate
    RESTORED = lambda: [  # noqa: E731 - set anew by every test
        *model.parameters(),
        *model.buffers(),
        *(value for state in optimizer.state.values() for value in state.values()),
    ]
    return model, StepGraph(compute, optimizer, clock, capture), rate


@pytest.mark.parametrize("method", ["vpt-deep", "lora-dropout", "mlp-3", "full"])
def test_replayed_steps_are_the_steps(method):
    plain, step, rate = training(method)
    recorded, graph, graph_rate = training(method, record)
    sizes = [8] * 6 + [5] + [8] * 4
    for index, size in enumerate(sizes):
        x, y = images(batch=size, seed=index).double(), labels(size)
        rate.fill_(1e-3 * (index + 1) / len(sizes))
        graph_rate.copy_(rate)
        # A head's dropout draws from torch's generator, which the training loop seeds before every step.
        torch.manual_seed(index)
        expected = float(step(x, y))
        torch.manual_seed(index)
        found = float(graph(x, y))
        assert found == pytest.approx(expected, rel=1e-10), f"step {index}"
    assert graph._replay is not None
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(recorded.state_dict()[name], tensor, rtol=1e-9, atol=1e-12, msg=name)
    if plain.fastpeft_host.clock is not None:
        assert int(recorded.fastpeft_host.clock.step) == len(sizes) == int(plain.fastpeft_host.clock.step)


def test_a_step_of_the_full_size_is_recorded():
    replayed = []

    def capture(function):
        replay, result = record(function)
        return lambda: (replayed.append(len(graph._inputs)), replay()), result

    # As of 29 images in batches of 8: the fourth step, the first that could be recorded, is a small one.
    sizes = [8, 8, 8, 5] * 3
    plain, step, _ = training("vpt-deep")
    recorded, graph, _ = training("vpt-deep", capture)
    for index, size in enumerate(sizes):
        x, y = images(batch=size, seed=index).double(), labels(size)
        assert float(graph(x, y)) == pytest.approx(float(step(x, y)), rel=1e-10), f"step {index}"
    assert replayed == [8] * 6
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(recorded.state_dict()[name], tensor, rtol=1e-9, atol=1e-12, msg=name)


def test_a_mask_that_stood_still_would_be_noticed():
    losses = []
    _, graph, _ = training("vpt-shallow-dropout", record)
    x, y = images(batch=8).double(), labels(8)
    rate = graph._optimizer.param_groups[0]["lr"]
    rate.fill_(0.0)
    for _ in range(8):
        losses.append(float(graph(x, y)))
    assert len(set(losses)) == len(losses), "with the same weights and images only the masks differ"


def test_recording_takes_no_step():
    model, graph, _ = training("vpt-deep", record)
    x, y = images(batch=8).double(), labels(8)
    for _ in range(StepGraph.EAGER_STEPS):
        graph(x, y)
    before = copy.deepcopy(model.state_dict())
    graph._record(x, y)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert int(model.fastpeft_host.clock.step) == StepGraph.EAGER_STEPS
    assert all(parameter.grad is None for parameter in model.parameters())
