"""mPLUG-base as it is, with random weights: both tasks' losses, LoRA's gradients and a search, patched and not."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import fastpeft
from bench.literal.mplug import apply_to_mplug
from fastpeft.models.mplug import Generation, MPlug, MPlugConfig
from tests.kernels.close import error

pytestmark = pytest.mark.slow

METHOD = fastpeft.LoRA(8, targets=("q", "k"))
BF16 = torch.bfloat16
SEARCH = Generation(beams=2, min_length=2, max_length=4)


@pytest.fixture(scope="module")
def plain():
    """Weights that bf16 can hold, in fp32."""
    torch.manual_seed(0)
    return MPlug.from_config(MPlugConfig.base()).to(BF16).float().eval()


@pytest.fixture(scope="module")
def exact(plain):
    """Losses and gradients of the literal model in fp32."""
    return step(literal_of(plain))


def literal_of(plain, dtype=torch.float32):
    return with_factors(apply_to_mplug(copy.deepcopy(plain).to(dtype), METHOD))


def ours_of(plain, dtype=torch.float32):
    return with_factors(fastpeft.patch(copy.deepcopy(plain).to(dtype), METHOD))


def with_factors(model):
    """In training mode; LoRA is not at its start, where half of its gradients are zero."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=draw))
    # The literal model does not put what is frozen to rest by itself.
    return model.train() if hasattr(model, "fastpeft_host") else model.eval()


def inputs(dtype):
    """Two images, a padded question or prompt each, captions, and one and two answers."""
    draw = torch.Generator().manual_seed(2)
    images = torch.randn(2, 3, 256, 256, generator=draw).to(dtype)
    ids, captions, answers = (torch.randint(1000, 30522, shape, generator=draw) for shape in ((2, 9), (2, 12), (3, 4)))
    ids[:, 0] = captions[:, 0] = answers[:, 0] = 101
    ids[1, 6:] = captions[0, 8:] = answers[1, 3:] = 0
    return images, ids, ids != 0, captions, answers


def memories(model):
    images, ids, mask, *texts = inputs(next(model.visual_encoder.parameters()).dtype)
    with torch.no_grad():
        image = model.encode_image(images)
    return model.memory(image, ids, mask), model.memory(image, None, route="image"), texts


def losses(model) -> dict[str, torch.Tensor]:
    fused, image, (captions, answers) = memories(model)
    weights, counts = torch.tensor([1.0, 0.3, 0.7]), torch.tensor([1, 2])
    return {
        "caption": model.caption_loss(captions, fused),
        "caption, image route": model.caption_loss(captions, image),
        "vqa": model.vqa_loss(answers, weights, counts, fused),
    }


def step(model):
    """The losses, and the gradients of their sum as they are left in all parameters."""
    found = losses(model)
    sum(found.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.item() for name, value in found.items()}, gradients


def as_vector(gradients):
    return torch.cat([gradients[name].flatten().double() for name in sorted(gradients)])


@torch.no_grad()
def search(model) -> list[list[list[int]]]:
    fused, *_ = memories(model.eval())
    return [[list(one.ids) for one in found] for found in model.generate(fused, SEARCH)]


def test_a_patched_model_is_the_unpatched_one(plain):
    with torch.no_grad():
        expected = losses(plain)
        # LoRA changes nothing at its start, and a frozen model's dropout rests while it trains.
        model = fastpeft.patch(copy.deepcopy(plain), METHOD).train()
        found = losses(model)
    for name, loss in expected.items():
        assert float(found[name]) == pytest.approx(float(loss), rel=1e-5)
    # Random weights know nothing: a token costs the logarithm of the vocabulary, an answer that of all of its tokens.
    token = math.log(30522)
    tokens = {"caption": 1.0, "caption, image route": 1.0, "vqa": (3 + 0.3 * 2 + 0.7 * 3) / 2}
    for name, count in tokens.items():
        assert abs(float(found[name]) / count - token) < 0.5
    said = search(plain)
    assert search(model) == said
    assert [len(found) for found in said] == [2, 2] and all(2 <= len(ids) <= 4 for found in said for ids in found)


def test_a_step_is_the_literal_ones(plain, exact):
    model = ours_of(plain)
    found, gradients = step(model)
    for name, loss in exact[0].items():
        assert found[name] == pytest.approx(loss, rel=1e-5)
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.split(".")[-1] in "AB" and ".lora." in name for name in gradients)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients.values())
    assert gradients.keys() == exact[1].keys()
    wrong = {name: error(value, exact[1][name]) for name, value in gradients.items()}
    assert max(wrong.values()) < 1e-4, max(wrong, key=wrong.get)


# On a CPU that has no products in bf16, minutes.
@pytest.mark.exhaustive
def test_a_step_in_bf16_is_as_exact_as_the_literal_one(plain, exact):
    (expected, slopes), errors = exact, []
    ours = ours_of(plain, BF16)
    for model in (ours, literal_of(plain, BF16)):
        found, gradients = step(model)
        assert gradients.keys() == slopes.keys()
        assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
        assert found == {name: pytest.approx(loss, rel=0.01) for name, loss in expected.items()}
        errors.append(error(as_vector(gradients), as_vector(slopes)))
    assert errors[0] <= 2 * errors[1]
    assert [len(found) for found in search(ours)] == [2, 2]
