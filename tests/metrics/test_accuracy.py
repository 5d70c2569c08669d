"""Top-1 accuracy and loss."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastpeft.metrics import Top1


def test_batches_add_up_to_the_whole():
    logits, labels = torch.randn(17, 4), torch.randint(4, (17,))
    counts = Top1()
    for rows in torch.arange(17).split(5):
        counts.update(logits[rows], labels[rows])
    counts.reduce()
    assert counts.count == 17
    assert counts.accuracy == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert counts.loss == pytest.approx(float(F.cross_entropy(logits, labels)))


def test_half_precision_logits_are_summed_in_full():
    logits = torch.randn(8, 3, dtype=torch.bfloat16)
    counts = Top1()
    counts.update(logits, torch.zeros(8, dtype=torch.long))
    assert counts.loss == pytest.approx(float(F.cross_entropy(logits.float(), torch.zeros(8, dtype=torch.long))))


def test_nothing_seen_is_not_a_number():
    assert math.isnan(Top1().accuracy) and math.isnan(Top1().loss)
