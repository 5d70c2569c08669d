"""Nothing that depends on a trainable tensor is kept: whatever changes a weight, the next forward sees it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastpeft
from tests.tiny import FEW, METHODS, images, labels, patched, vit
from tests.twins import literal_of


def optimizer_step(model, optimizer):
    optimizer.zero_grad()
    F.cross_entropy(model.train()(images(dtype=torch.float64)), labels()).backward()
    optimizer.step()


def by_optimizer(kind, **options):
    def change(model):
        optimizer_step(model, kind(fastpeft.trainable_parameters(model), lr=0.1, **options))

    return change


def by_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.01)


def by_new_data(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.01


def by_no_grad(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)


def by_loading(model):
    model.load_state_dict({n: t * 1.01 if t.is_floating_point() else t for n, t in model.state_dict().items()})


def by_assigning(model):
    state = {n: t * 1.01 if t.is_floating_point() else t for n, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def by_new_parameters(model):
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                setattr(module, name, torch.nn.Parameter(parameter.detach() * 1.01, parameter.requires_grad))


CHANGES = {
    "SGD": by_optimizer(torch.optim.SGD),
    "AdamW": by_optimizer(torch.optim.AdamW),
    "AdamW foreach": by_optimizer(torch.optim.AdamW, foreach=True),
    "AdamW fused": by_optimizer(torch.optim.AdamW, fused=True),
    ".data in place": by_data,
    ".data replaced": by_new_data,
    "no_grad": by_no_grad,
    "load_state_dict": by_loading,
    "load_state_dict(assign=True)": by_assigning,
    "new parameters": by_new_parameters,
    "refresh": lambda model: (by_data(model), fastpeft.refresh(model)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", [*FEW, "mlp-3"])
def test_the_next_evaluation_has_the_new_weights(method, change):
    model, x = patched(METHODS[method], dtype=torch.float64).eval(), images(dtype=torch.float64)
    with torch.no_grad():
        before = model(x)
    CHANGES[change](model)
    with torch.no_grad():
        after = model.eval()(x)
    assert not torch.allclose(before, after, rtol=1e-6)
    twin = literal_of(model, vit(), METHODS[method], torch.float64).eval()
    torch.testing.assert_close(after, twin(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", FEW)
def test_moving_to_another_type(method):
    model = patched(METHODS[method]).eval()
    expected = model(images())
    torch.testing.assert_close(model.double()(images().double()), expected.double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.float()(images()), expected)
    half = model.bfloat16()(images().bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).norm() < 0.1 * expected.norm()


def test_refresh_follows_replaced_modules():
    model, x = patched(METHODS["lora-q-v"]).eval(), images()
    model.blocks[1].mlp = vit(seed=5).blocks[1].mlp
    plain = vit().eval()
    twin = patched(METHODS["lora-q-v"]).eval()
    twin.blocks[1].mlp.load_state_dict(model.blocks[1].mlp.state_dict())
    torch.testing.assert_close(fastpeft.refresh(model)(x), twin(x))
    assert not torch.allclose(model(x), plain(x))
    model.blocks = model.blocks[:2]
    with pytest.raises(fastpeft.UnsupportedModelError, match="other blocks than when it was patched"):
        fastpeft.refresh(model)
