"""A model and its patched copy: the same thing asked of both must give the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import fastpeft

Call = Callable[[nn.Module, Tensor], object]


def forward(model: nn.Module, x: Tensor):
    """The model's output."""
    return model(x)


def pair(model: nn.Module, **options) -> tuple[nn.Module, nn.Module]:
    """The model as it is, and a patched copy; patching has changed no key, no parameter and no `requires_grad`."""
    patched = fastpeft.patch(copy.deepcopy(model), **options)
    assert_same_state(model, patched)
    return model, patched


def assert_same_state(expected: nn.Module, actual: nn.Module) -> None:
    """Equal keys, values, `requires_grad` and modes."""
    wanted, found = expected.state_dict(), actual.state_dict()
    assert list(wanted) == list(found)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    trained = [{name: p.requires_grad for name, p in model.named_parameters()} for model in (expected, actual)]
    assert trained[0] == trained[1]
    modes = [{name: module.training for name, module in model.named_modules()} for model in (expected, actual)]
    assert modes[0] == modes[1]


def tensors(value: object) -> Iterator[Tensor]:
    """The tensors in a nested result, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for key in sorted(value):
            yield from tensors(value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def step(model: nn.Module, x: Tensor, call: Call = forward, seed: int = 7) -> dict[str, Tensor]:
    """Everything that a call and its backward pass give: outputs, gradients, and the next random number."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    outputs = list(tensors(call(model, x)))
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    found["random numbers used"] = torch.rand(3)
    generator = torch.Generator().manual_seed(seed)
    loss = sum(
        (out.double() * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum() for out in outputs
    )
    if loss.requires_grad:
        loss.backward()
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(expected: dict[str, Tensor], actual: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Equal names, shapes and types; values within the tolerance of the tensor's largest one."""
    assert expected.keys() == actual.keys()
    for name, wanted in expected.items():
        found = actual[name]
        assert (wanted.dtype, wanted.shape) == (found.dtype, found.shape), name
        size = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
        error = float((wanted.double() - found.double()).abs().max()) if wanted.numel() else 0.0
        assert error <= tolerance * size, f"{name} differs by {error:.2g}, largest value {size:.2g}"


def assert_same_steps(expected: nn.Module, actual: nn.Module, x: Tensor, call: Call = forward, tolerance=1e-10) -> None:
    """One step of each, in training and in evaluation mode."""
    for training in (True, False):
        modes = [{m: m.training for m in model.modules()} for model in (expected, actual)]
        assert_same(step(expected.train(training), x, call), step(actual.train(training), x, call), tolerance)
        for mode in modes:
            for module, was in mode.items():
                module.training = was
