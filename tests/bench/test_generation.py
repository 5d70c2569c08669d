"""The benchmark of generation in little."""

from __future__ import annotations

import pytest
import torch

from bench import generation
from bench.cost.settings import Settings
from bench.generation import BEAMS, HUGGING_FACE, OURS, UNCACHED, WHO, Size
from bench.tables.errors import TableError

LITTLE = Size(layers=2, width=32, heads=4, intermediate=48, vocabulary=40, rows=9, batch=3, tokens=5)


@pytest.mark.parametrize("beams", BEAMS)
def test_all_say_the_same(beams):
    memory = generation.memory_of(LITTLE, torch.float32)
    found = {
        who: texts()
        for who, texts in generation.implementations(generation.decoder(LITTLE), memory, beams, LITTLE.tokens).items()
    }
    assert tuple(found) == WHO
    assert found[UNCACHED].shape == (3, 5)
    for who, texts in found.items():
        assert torch.equal(texts, found[UNCACHED]), who
    assert len({tuple(text) for text in found[OURS].tolist()}) > 1, "the memory does not matter"


def test_measured_in_turns():
    settings = Settings(turns=3, dtype="bf16", seconds=0)
    records = generation.measure("little", 5, settings, LITTLE)
    assert [record["who"] for record in records] == list(WHO)
    assert all(len(record["turns"]) == 3 and min(record["turns"]) > 0 for record in records)
    base = next(record for record in records if record["who"] == UNCACHED)
    assert base["ratio"] == 1 and base["same_texts"] == 1
    lines = generation.render(records).splitlines()
    assert "2 layers, 32 wide, vocabulary 40; 3 memories of 9 rows, 5 tokens, bf16" in lines[0]
    assert [line.split()[0] for line in lines[2:6]] == ["5"] * 4
    assert all(who in line for who, line in zip(WHO, lines[2:6], strict=True))


def test_who_says_something_else_is_named(monkeypatch):
    monkeypatch.setattr(generation, "hugging_face", lambda model, memory, settings: lambda: torch.zeros(2, 4).long())
    with pytest.raises(TableError, match=f"generation, 5 beams: {HUGGING_FACE} says"):
        generation.check(LITTLE)
