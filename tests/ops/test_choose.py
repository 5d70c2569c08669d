"""The dispatcher on emulated chips: what is chosen, why something else is not, and what is said."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from fastpeft._native import LEVELS
from fastpeft.ops import choose
from fastpeft.ops.choose import CHOICES, OPERATORS, BackendError, Chip, asked, emulated, unavailable

CPU = torch.device("cpu")
H100, A100, T4, OLD = Chip("cuda", 90), Chip("cuda", 80), Chip("cuda", 75), Chip("cuda", 70)


@pytest.fixture
def installed(monkeypatch):
    """Every package is there, and every implementation is a stand-in whose reasons the test decides."""
    choose.unavailable.cache_clear()
    choose.say_once.cache_clear()
    monkeypatch.setattr(choose.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(choose._cuda, "unavailable", lambda capability: None)
    modules = {}

    def module(operator, backend):
        return modules.setdefault((operator, backend), SimpleNamespace(reasons=lambda: [], name=(operator, backend)))

    monkeypatch.setattr(choose, "_module", module)
    yield module
    choose.unavailable.cache_clear()
    choose.say_once.cache_clear()


def pick(wish, chip, operator="prompt_attention"):
    with emulated(chip):
        found = choose.choose(operator, wish, CPU, lambda module: module.reasons())
    return found and found.name[1]


def test_what_nobody_measured_is_not_chosen_by_default(installed):
    for operator in OPERATORS:
        assert pick("auto", H100, operator) is None
        with choose.emulated(H100):
            assert choose.is_reference(operator, "auto", torch.device("cuda"))


def test_what_is_chosen_on_cpus(installed, monkeypatch):
    monkeypatch.setattr(choose._native, "library", lambda: object())
    amx, avx2 = (Chip("cpu", list(LEVELS).index(level)) for level in ("amx", "avx2"))
    for operator in OPERATORS:
        assert pick("auto", avx2, operator) == ("cpu" if operator == "prompt_attention" else None)
        assert pick("auto", amx, operator) == ("cpu" if operator in ("prompt_attention", "layer_norm") else None)


def test_what_was_measured_is_chosen_on_that_chip_alone(installed, monkeypatch):
    monkeypatch.setitem(choose.PROVEN, ("prompt_attention", "cuda", 90), ("triton", "xformers"))
    assert pick("auto", H100) == "triton"
    assert pick("auto", A100) is None
    assert pick("auto", Chip("cpu")) is None
    for chip, operator, known in (
        (H100, "prompt_attention", False),
        (A100, "prompt_attention", True),
        (H100, "mlp", True),
    ):
        with choose.emulated(chip):
            assert choose.is_reference(operator, "auto", torch.device("cuda")) == known


def test_the_next_best_serves_what_the_best_cannot(installed, monkeypatch, caplog):
    monkeypatch.setitem(choose.PROVEN, ("prompt_attention", "cuda", 90), ("triton", "xformers"))
    installed("prompt_attention", "triton").reasons = lambda: ["a bias with a gradient"]
    with caplog.at_level(logging.INFO, logger="fastpeft"):
        assert pick("auto", H100) == "xformers"
        assert pick("auto", H100) == "xformers"
    assert len(caplog.records) == 1, "a fallback is said once"
    assert "triton cannot: a bias with a gradient" in caplog.text
    installed("prompt_attention", "xformers").reasons = lambda: ["a mask"]
    assert pick("auto", H100) is None


def test_a_name_asked_for_runs_or_is_an_error_with_every_reason(installed):
    assert pick("triton", H100) == "triton" and pick("triton", T4) == "triton"
    assert pick("reference", H100) is None
    installed("prompt_attention", "triton").reasons = lambda: ["head dim 200 is above 128"]
    with pytest.raises(BackendError) as caught:
        pick("triton", H100)
    message = str(caught.value)
    assert "triton: head dim 200 is above 128" in message and "xformers: could run" in message
    assert "reference always can" in message


def test_chips_without_the_instructions(installed):
    assert "needs compute capability 7.5, the GPU has 7.0" in unavailable("mlp", "triton", OLD)
    with pytest.raises(BackendError, match=r"7\.0"):
        pick("triton", OLD)
    assert "needs an NVIDIA GPU, the tensors are on cpu" in unavailable("mlp", "triton", Chip("cpu"))
    assert unavailable("mlp", "triton", Chip("cpu", interpreted=True)) is None
    assert "no xformers implementation of mlp" in unavailable("mlp", "xformers", H100)


def test_cuda_kernels_where_they_are_built(installed, monkeypatch):
    assert pick("cuda", H100) == pick("cuda", A100, "adapter") == "cuda"
    for chip, words in ((T4, r"needs compute capability 8\.0, the GPU has 7\.5"), (Chip("cpu"), "needs an NVIDIA GPU")):
        with pytest.raises(BackendError, match=f"cuda was asked for .*cuda: {words}"):
            pick("cuda", chip)
    assert unavailable("mlp", "cuda", H100) == "there is no cuda implementation of mlp"
    found = asked("cuda", {})
    assert {name for name, wish in found.items() if wish == "cuda"} == {"prompt_attention", "adapter"}
    monkeypatch.setitem(choose.PROVEN, ("adapter", "cuda", 90), ("cuda", "triton"))
    assert pick("auto", H100, "adapter") == "cuda" and pick("auto", A100, "adapter") is None
    installed("adapter", "cuda").reasons = lambda: ["there are 200 hidden units, not 1 to 128"]
    assert pick("auto", H100, "adapter") == "triton"


def test_cuda_kernels_that_are_not_built(installed, monkeypatch, caplog):
    monkeypatch.setattr(choose._cuda, "unavailable", lambda capability: "its library is not built")
    monkeypatch.setitem(choose.PROVEN, ("adapter", "cuda", 90), ("cuda", "triton"))
    with caplog.at_level(logging.INFO, logger="fastpeft"):
        assert pick("auto", H100, "adapter") == "triton"
    assert "cuda cannot: its library is not built" in caplog.text
    with pytest.raises(BackendError, match=r"cuda: its library is not built; .*reference always can"):
        pick("cuda", H100)


def test_missing_packages_are_named(monkeypatch):
    choose.unavailable.cache_clear()
    monkeypatch.setattr(choose.importlib.util, "find_spec", lambda name: None)
    assert unavailable("prompt_attention", "xformers", H100) == "xformers is not installed"
    assert unavailable("mlp", "triton", H100) == "triton is not installed"
    choose.unavailable.cache_clear()


def test_wishes_come_from_the_environment_first():
    assert asked("auto", {}) == dict.fromkeys(CHOICES, "auto")
    everywhere = dict.fromkeys(CHOICES, "auto") | dict.fromkeys(OPERATORS, "triton")
    assert asked("triton", {}) == everywhere
    assert asked("triton", {"FASTPEFT_BACKEND_MLP": "reference"}) == everywhere | {"mlp": "reference"}
    environment = {"FASTPEFT_BACKEND": "triton", "FASTPEFT_BACKEND_ADAPTER": "auto"}
    assert asked("auto", environment) == everywhere | {"adapter": "auto"}


def test_one_name_for_all_leaves_out_what_does_not_have_it():
    found = asked("xformers", {})
    assert found.pop("prompt_attention") == "xformers" and set(found.values()) == {"auto"}
    with pytest.raises(BackendError, match="FASTPEFT_BACKEND_MLP: mlp has no xformers implementation, only reference"):
        asked("auto", {"FASTPEFT_BACKEND_MLP": "xformers"})


@pytest.mark.parametrize("source, environment", [("backend", {}), ("FASTPEFT_BACKEND", {"FASTPEFT_BACKEND": "magic"})])
def test_unknown_names(source, environment):
    with pytest.raises(BackendError, match=f"{source} must be one of auto, reference, .*, got 'magic'"):
        asked("auto" if environment else "magic", environment)


def test_the_table_says_something_of_everything(installed):
    rows = choose.table(H100)
    assert [row[0] for row in rows if row[1] == "reference"] == list(CHOICES)
    assert all(row[2] for row in rows)
    assert ("mlp", "triton", "only when asked for: not measured on this chip yet") in rows


def test_real_modules_are_where_the_table_says():
    import importlib

    pytest.importorskip("triton")
    for (operator, backend), path in choose._MODULES.items():
        module = importlib.import_module(path)
        runs = (module.attention_branch, module.mlp_branch) if operator == "block" else (module.forward,)
        assert callable(module.reasons) and all(map(callable, runs)), (operator, backend)
