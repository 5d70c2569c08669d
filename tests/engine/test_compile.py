"""torch.compile: whole graphs, the same numbers, and no recompilation as training goes on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastpeft
from tests.thinned import thinned
from tests.tiny import FEW, METHODS, images, labels, patched, vit
from tests.twins import step


class Counter:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, _inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(method, **options):
    """Two blocks, one that ends in prompts nobody reads and one with all rows: what takes long is tracing."""
    return (
        patched(METHODS[method], depth=2, **options) if method else fastpeft.patch(vit(depth=2).requires_grad_(False))
    )


QUICK = ("vpt-deep", "lora-all", "adapter")
OTHERS = [pytest.param(m, marks=pytest.mark.slow) for m in METHODS if m not in QUICK and "vpt-last" not in m]


@pytest.mark.parametrize("method", [*QUICK, None, *OTHERS])
def test_the_whole_model_is_one_graph(method):
    model = small(method).train()
    counter = Counter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.manual_seed(0)
    fastpeft.set_rng_state(model, step=0)
    expected = model(images())
    torch.manual_seed(0)
    fastpeft.set_rng_state(model, step=0)
    torch.testing.assert_close(compiled(images()), expected)
    assert counter.graphs == 1


@pytest.mark.parametrize("method", [*FEW, "parallel-skip", "lora-dropout"])
def test_a_block_is_one_graph(method):
    model = patched(METHODS[method]).eval()
    counter = Counter()
    block = torch.compile(model.blocks[0], backend=counter, fullgraph=True)
    x = torch.randn(2, 17, 32)
    torch.testing.assert_close(block(x), model.blocks[0](x))
    assert counter.graphs == 1


@pytest.mark.parametrize("method", thinned(["lora-dropout", "vpt-deep"], 2))
def test_dropout_steps_do_not_recompile(method):
    model = small(method).train()
    counter = Counter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD(fastpeft.trainable_parameters(model), lr=0.01)
    logits = []
    for _ in range(5):
        out = compiled(images())
        F.cross_entropy(out, labels()).backward()
        optimizer.step()
        logits.append(out.detach())
    assert counter.graphs == 1
    assert fastpeft.get_rng_state(model)["step"] == 5
    assert not torch.allclose(logits[0], logits[1])


@pytest.mark.parametrize("method", thinned(["lora-dropout", "vpt-deep"], 2))
def test_gradients_through_the_traced_backward(method):
    # The dropout masks are drawn again in the backward graph, or kept: they must be the forward's.
    model = small(method, dtype=torch.float64).train()
    x = images(dtype=torch.float64)
    fastpeft.set_rng_state(model, step=0)
    expected = step(model, x)
    model.zero_grad()
    fastpeft.set_rng_state(model, step=0)
    compiled = step(_Compiled(model, "aot_eager_decomp_partition"), x)
    for name, tensor in expected.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-9, atol=1e-12)


class _Compiled:
    """A compiled model that lists its parameters by their own names."""

    def __init__(self, model, backend):
        self.model, self.forward = model, torch.compile(model, backend=backend, fullgraph=True)

    def __call__(self, x):
        return self.forward(x)

    def __getattr__(self, name):
        return getattr(self.model, name)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["vpt-deep", "lora-all", "adapter"])
def test_inductor(method):
    model = patched(METHODS[method]).train()
    x = images()
    fastpeft.set_rng_state(model, step=0)
    expected = step(model, x)
    model.zero_grad()
    fastpeft.set_rng_state(model, step=0)
    found = step(_Compiled(model, "inductor"), x)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_switching_modes_and_sizes_stays_right():
    model = small("vpt+lora")
    compiled = torch.compile(model, backend="eager")
    for training, batch in ((True, 2), (False, 2), (False, 5), (True, 3), (False, 1)):
        model.train(training)
        x = images(batch=batch)
        fastpeft.set_rng_state(model, step=3)
        expected = model(x)
        fastpeft.set_rng_state(model, step=3)
        torch.testing.assert_close(compiled(x), expected)
