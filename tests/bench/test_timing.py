"""Timing and memory figures: what they count, checked where the answer is known."""

from __future__ import annotations

import itertools
import json
import platform
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import memory, timing
from bench.cases import METHODS, build, create_model, token_rows
from bench.record import Record

_ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("names, rounds", [("a", 1), ("ab", 2), ("abc", 6), ("abcd", 4), ("abcde", 10), ("abcdef", 6)])
def test_each_variant_follows_each_other_one_equally_often(names, rounds):
    calls = []
    found = timing.interleave({name: (lambda n=name: calls.append(n)) for name in names}, turns=rounds, warmup=0)
    assert {name: figures.turns for name, figures in found.items()} == dict.fromkeys(names, rounds)
    turns = [calls[begin : begin + len(names)] for begin in range(0, len(calls), len(names))]
    assert all(sorted(turn) == list(names) for turn in turns)
    pairs = Counter(pair for turn in turns for pair in itertools.pairwise(turn))
    assert len(pairs) == len(names) * (len(names) - 1) and len(set(pairs.values())) <= 1


def test_a_spent_budget_still_gives_three_turns():
    assert timing.interleave({"a": lambda: None}, turns=50, budget=0.0)["a"].turns == 3


def test_summary_of_seconds():
    figures = timing.Timing.of([0.005, 0.001, 0.002, 0.003, 0.004, 0.006])
    assert (figures.median, figures.p20, figures.p80) == (0.0035, 0.002, 0.005)
    assert figures.to_dict(per=2)["median_ms"] == pytest.approx(1.75)


@pytest.mark.parametrize(
    ("name", "products"),
    [
        ("linear", {"forward": 8}),
        ("partial-1", {"forward": 8, "input": 4, "weight": 4}),
        ("vpt-deep-1", {"forward": 8, "input": 8}),
        ("full", {"forward": 8, "input": 8, "weight": 8}),
    ],
)
def test_floor_runs_the_products_that_training_needs(name, products):
    model = build("literal", METHODS[name](), create_model("vit_tiny_patch16_224", image_size=32, depth=2))
    step = timing.floor(model, token_rows(model, 2))
    counted = FlopCounterMode(display=False)
    with counted:
        step()
    one_forward = sum(
        2 * token_rows(model, 2) * layer.weight.numel()
        for block in model.blocks
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
    )
    assert counted.get_total_flops() == one_forward * sum(products.values()) / 8


def test_saved_bytes_counts_storages_once_and_no_weight():
    layer = torch.nn.Linear(4, 3, bias=False)
    layer.weight.requires_grad_(False)
    x = torch.randn(5, 4, requires_grad=True)
    assert memory.saved_bytes(lambda: layer(x), layer) == 0
    assert memory.saved_bytes(lambda: x.exp() + x.exp(), layer) == 2 * x.nbytes
    assert memory.saved_bytes(lambda: (x * x).sum(), layer) == x.nbytes


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_resident_peak_sees_what_is_freed_again():
    with memory.ResidentPeak() as peak:
        torch.ones(64 * 2**20, dtype=torch.uint8)
    # Less what else the process gave back meanwhile, more what the allocator adds.
    assert 60 * 2**20 < peak.bytes < 100 * 2**20


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="a setting of glibc's heap")
def test_blocks_between_others_are_given_back_where_each_has_pages_of_its_own(own):
    program = f"""
        import torch
        from bench.memory import own_pages
        from fastpeft.trainer.memory import resident
        assert not {own} or own_pages()
        block = lambda mebibytes: torch.ones(mebibytes * 2**20, dtype=torch.uint8)
        block(16)  # freed, it makes glibc serve the ones to come from its heap, unless told otherwise
        blocks = [block(1) for _ in range(64)]
        held = resident()
        del blocks[::2]
        print(held - resident())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    given_back = int(done.stdout)
    assert given_back > 30 * 2**20 if own else given_back < 8 * 2**20


def test_a_failing_subprocess_gives_its_last_words():
    with pytest.raises(RuntimeError, match=r"No module named bench\.nothing"):
        memory.in_subprocess("bench.nothing")


def test_environment_names_machine_versions_command_and_date():
    found = timing.environment()
    assert found["versions"]["torch"] == torch.__version__.split("+")[0] or found["versions"]["torch"]
    assert found["device"] and found["command"].startswith("python") and found["date"].startswith("20")


def test_record_adds_rows_over_runs(tmp_path):
    path = tmp_path / "device.json"
    first = Record(path, "cpu")
    first.add("steps", "a", {"x": 1})
    first.add("steps", "b", {"error": "no memory"})
    second = Record(path, "cpu")
    assert second.done("steps", "a") and not second.done("steps", "b") and not second.done("verify", "a")
    second.add("steps", "b", {"x": 2})
    data = json.loads(path.read_text())
    assert [row["run"] for row in data["parts"]["steps"].values()] == [0, 1] and len(data["runs"]) == 2


def test_record_refuses_another_device(tmp_path):
    path = tmp_path / "device.json"
    path.write_text(json.dumps({"runs": [{"device": "Another"}], "parts": {}}))
    with pytest.raises(ValueError, match="results of Another"):
        Record(path, "cpu")
