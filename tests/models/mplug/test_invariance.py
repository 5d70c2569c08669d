"""How a batch is put together changes no sample's result."""

from __future__ import annotations

import pytest
import torch

from fastpeft.models.mplug import Stream
from tests.models.mplug.tiny import batch, make

close = torch.testing.assert_close
TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


@pytest.fixture(scope="module")
def model():
    return make().double()


def results(model, images, ids, mask, text):
    """Streams, logits and losses, one row a sample."""
    image = model.encode_image(images)
    encoded = model.encode_text(ids, mask)
    v, t = model.fuse(encoded, image)
    memory = model.memory(image, ids, mask)
    logits = model.decode(text, text != 0, memory)
    losses, _ = model.token_losses(text, memory)
    return encoded.states, v.states, t.states, logits, losses.sum(1)


@torch.no_grad()
def test_order(model):
    given = batch(dtype=torch.float64)
    expected = results(model, given.images, given.ids, given.mask, given.text)
    order = torch.tensor([2, 0, 1])
    found = results(model, given.images[order], given.ids[order], given.mask[order], given.text[order])
    for one, other in zip(found, expected, strict=True):
        close(one, other[order], **TOLERANCE)


@torch.no_grad()
def test_company_and_padding(model):
    given = batch(dtype=torch.float64)
    together = results(model, given.images, given.ids, given.mask, given.text)
    for i in range(3):
        length, written = int(given.mask[i].sum()), int((given.text[i] != 0).sum())
        here = slice(i, i + 1)
        alone = results(
            model,
            given.images[here],
            given.ids[here, :length],
            given.mask[here, :length],
            given.text[here, :written],
        )
        for one, other, rows in zip(alone, together, (length, None, length, written, None), strict=True):
            close(one[0], other[i] if rows is None else other[i, :rows], **TOLERANCE)


@torch.no_grad()
def test_what_stands_in_the_padding(model):
    given = batch(dtype=torch.float64)
    expected = results(model, given.images, given.ids, given.mask, given.text)
    other = given.ids.masked_fill(~given.mask, 17)
    found = results(model, given.images, other, given.mask, given.text)
    for one, two, keep in zip(found, expected, (given.mask, None, given.mask, None, None), strict=True):
        close(one if keep is None else one[keep], two if keep is None else two[keep], **TOLERANCE)


@torch.no_grad()
def test_no_mask_is_a_mask_of_ones(model):
    given = batch(dtype=torch.float64)
    everything = torch.ones_like(given.mask)
    expected = results(model, given.images, given.ids, everything, given.text)
    found = results(model, given.images, given.ids, None, given.text)
    for one, two in zip(found, expected, strict=True):
        close(one, two, **TOLERANCE)


@torch.no_grad()
def test_a_later_token_changes_no_earlier_logit(model):
    memory = Stream(torch.randn(1, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    expected = model.decode(ids, None, memory)
    for position in range(1, 5):
        changed = ids.clone()
        changed[0, position] = 44
        found = model.decode(changed, None, memory)
        close(found[:, :position], expected[:, :position], **TOLERANCE)
        assert (found[:, position:] - expected[:, position:]).abs().amax(-1).min() > 1e-4
