"""Training steps of a model whose attention and adapters run on the emulated CUDA kernels, against float64."""

from __future__ import annotations

import copy
import statistics

import pytest
import torch

import fastpeft
from fastpeft.engine.extensions import Bottleneck
from fastpeft.ops import choose, cuda_adapter, cuda_attention
from fastpeft.ops.choose import Chip, emulated
from tests.engine.test_backends import step
from tests.kernels.close import error
from tests.tiny import METHODS, images, patched

REACHES = {
    "vpt-deep": {"prompt_attention"},
    "prefix-kv": {"prompt_attention"},
    "lora-all": {"prompt_attention"},
    "adapter": {"prompt_attention", "adapter"},
    "serial": {"prompt_attention", "adapter"},
}
WIDE = {"embed_dim": 64}  # two heads of 32, the smallest that the kernels take


def _watched(inner, seen, operator):
    def spy(*args, **kwargs):
        seen.add(operator)
        return inner(*args, **kwargs)

    return spy


@pytest.fixture
def calls(operators, monkeypatch):
    """Operators whose CUDA implementation was called, forward or backward."""
    seen = {"forward": set(), "backward": set()}
    for operator, module in (("prompt_attention", cuda_attention), ("adapter", cuda_adapter)):
        for name in seen:
            monkeypatch.setattr(module, name, _watched(getattr(module, name), seen[name], operator))
    choose.unavailable.cache_clear()
    with emulated(Chip("cuda", 90)):
        yield seen
    choose.unavailable.cache_clear()


def smooth(model):
    """The model with adapters without a kink, at which either backend may be far off by luck."""
    for module in model.modules():
        if isinstance(module, Bottleneck):
            module.act = "gelu"
    return model


QUICK = [("vpt-deep", torch.bfloat16), ("lora-all", torch.float16), ("adapter", torch.bfloat16)]
CASES = [
    pytest.param(method, dtype, marks=() if (method, dtype) in QUICK else pytest.mark.slow)
    for method in REACHES
    for dtype in (torch.bfloat16, torch.float16)
]


@pytest.mark.parametrize("method, dtype", CASES)
def test_a_step_is_as_close_as_the_references(method, dtype, calls):
    ours, plain = {}, {}
    for draw in range(5):
        exact = smooth(patched(METHODS[method], seed=draw, dtype=torch.float64, **WIDE).train())
        want, slopes = step(exact, images(seed=draw, dtype=torch.float64))
        slopes["logits"] = want
        for errors, backend in ((plain, "reference"), (ours, "cuda")):
            twin = copy.deepcopy(exact).to(dtype)
            fastpeft.patch(twin, backend=backend)
            logits, gradients = step(twin, images(seed=draw, dtype=dtype))
            assert gradients.keys() | {"logits"} == slopes.keys()
            for name, value in ({"logits": logits} | gradients).items():
                errors.setdefault(name, []).append(error(value, slopes[name]))
    assert calls["forward"] == calls["backward"] == REACHES[method]
    found = {name: (statistics.median(ours[name]), statistics.median(plain[name])) for name in ours}
    wrong = {name: pair for name, pair in found.items() if not pair[0] <= 2 * pair[1]}
    assert not wrong, "relative errors (kernels, reference), medians over draws"
