"""Opening the library of CUDA kernels: late, once, and with a reason where it is not to be had."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch

from fastpeft import _cuda
from fastpeft.ops import choose, cuda_adapter, cuda_attention
from fastpeft.ops.choose import Chip

H100 = Chip("cuda", 90)


@pytest.fixture
def fresh(monkeypatch):
    """Nothing is remembered of the library, before and after."""
    _cuda._open.cache_clear()
    choose.unavailable.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    _cuda._open.cache_clear()
    choose.unavailable.cache_clear()


@pytest.fixture
def loaded(fresh):
    """A library for two chips."""
    fresh.setattr(_cuda, "_open", lambda: (object(), "8.0 9.0a", "loaded"))


def test_not_built(fresh, tmp_path, recwarn):
    fresh.setattr(_cuda, "LIBRARY", tmp_path / "missing.so")
    assert _cuda.library() is None and "FASTPEFT_CUDA=1 pip install" in _cuda.status()
    why = choose.unavailable("prompt_attention", "cuda", H100)
    assert why.startswith("its library is not built; to build it: FASTPEFT_CUDA=1") and "\n" not in why
    assert choose.unavailable("adapter", "cuda", H100) == why
    assert ("adapter", "cuda", why) in choose.table(H100)
    assert not recwarn.list, "what was never asked for is not missed"


def test_a_file_that_is_no_library(fresh, tmp_path):
    fresh.setattr(_cuda, "LIBRARY", tmp_path / "broken.so")
    _cuda.LIBRARY.write_text("nothing")
    with pytest.warns(RuntimeWarning, match="goes on without its CUDA kernels, whose library cannot be loaded"):
        assert _cuda.library() is None
    assert choose.unavailable("adapter", "cuda", H100).startswith("its library cannot be loaded: ")
    assert _cuda.status().endswith("; rebuild it with FASTPEFT_CUDA=1 pip install --no-build-isolation .")


def test_torch_too_old(fresh, tmp_path):
    fresh.setattr(_cuda, "LIBRARY", tmp_path / "any.so")
    fresh.setattr(torch, "__version__", "2.9.1+cu130")
    fresh.setattr(torch.ops, "load_library", lambda path: pytest.fail("it is not even opened"))
    _cuda.LIBRARY.touch()
    with pytest.warns(RuntimeWarning, match="needs torch 2.11 or later, this is 2.9.1"):
        assert _cuda.library() is None


def test_a_library_of_other_sources(fresh, tmp_path):
    fresh.setattr(_cuda, "LIBRARY", tmp_path / "old.so")
    _cuda.LIBRARY.touch()

    def function(value):
        return lambda: value

    old = types.SimpleNamespace(
        fastpeft_cuda_interface=function(_cuda.INTERFACE - 1), fastpeft_cuda_architectures=function(b"9.0a")
    )
    fresh.setattr(torch.ops, "load_library", lambda path: None)
    fresh.setattr(_cuda.ctypes, "CDLL", lambda path: old)
    with pytest.warns(RuntimeWarning, match="was built from other sources"):
        assert _cuda.library() is None
    with pytest.warns(RuntimeWarning) as caught:
        _cuda._open.cache_clear()
        _cuda.library(), _cuda.library(), _cuda.status()
    assert len(caught) == 1, "one warning"


def test_of_the_version_that_the_tests_compile(compiled):
    assert compiled._library.fastpeft_cuda_interface() == _cuda.INTERFACE


@pytest.mark.parametrize(
    "version, parts", [("2.13.0+cpu", (2, 13)), ("2.11.0a0+git", (2, 11)), ("3.0", (3, 0)), ("2.9.1", (2, 9))]
)
def test_versions_of_torch(monkeypatch, version, parts):
    monkeypatch.setattr(torch, "__version__", version)
    assert _cuda.torch_version() == parts


def test_which_chips_run_what():
    everything = "8.0 9.0a 10.0"
    assert all(_cuda.covers(everything, chip) for chip in [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)])
    assert not any(_cuda.covers(everything, chip) for chip in [(7, 0), (7, 5)])
    assert _cuda.covers("9.0a", (9, 0)) and not _cuda.covers("9.0a", (10, 0)), "what is made for one chip runs there"
    assert _cuda.covers("8.6", (8, 9)) and not _cuda.covers("8.6", (8, 0)) and _cuda.covers("8.6", (9, 0))
    assert not _cuda.covers("8.0 10.0", (9, 0)), "PTX is there of the last one only"
    assert _cuda.covers("10.0f", (10, 3)) and not _cuda.covers("10.0f", (12, 0))


def test_a_chip_that_it_was_not_compiled_for(loaded):
    assert choose.unavailable("prompt_attention", "cuda", H100) is None
    assert choose.unavailable("prompt_attention", "cuda", Chip("cuda", 86)) is None
    why = choose.unavailable("prompt_attention", "cuda", Chip("cuda", 100))
    assert why is None, "PTX of 8.0 is compiled by the driver"
    assert "needs compute capability 8.0, the GPU has 7.5" in choose.unavailable("adapter", "cuda", Chip("cuda", 75))
    assert "needs an NVIDIA GPU, the tensors are on cpu" in choose.unavailable("adapter", "cuda", Chip("cpu"))
    assert choose.unavailable("mlp", "cuda", H100) == "there is no cuda implementation of mlp"


def test_a_chip_between(fresh):
    fresh.setattr(_cuda, "_open", lambda: (object(), "9.0a", "loaded"))
    why = choose.unavailable("adapter", "cuda", Chip("cuda", 100))
    assert why == "its library has compute capabilities 9.0a, the GPU has 10.0"


def test_reasons_on_a_cpu_open_nothing(fresh):
    fresh.setattr(_cuda, "_open", lambda: pytest.fail("opened"))
    q, x, factor = torch.zeros(1, 1, 2, 64).bfloat16(), torch.zeros(2, 64).bfloat16(), torch.zeros(8, 64)
    expected = ["needs an NVIDIA GPU, the tensors are on cpu"]
    assert cuda_attention.reasons(q, q, q, scale=1.0) == expected
    assert cuda_adapter.reasons(x, factor, None, factor.t(), None, "gelu", 1.0) == expected


def test_import_opens_nothing_and_info_says_what_is_there():
    script = (
        "import fastpeft, fastpeft._cuda as cuda, fastpeft.ops.cuda_attention, fastpeft.ops.cuda_adapter, torch\n"
        "print(cuda._open.cache_info().currsize, torch.cuda.is_initialized())\n"
        "from fastpeft.info import describe\n"
        "print(describe()['devices']['CUDA kernels'] == cuda.status(), torch.cuda.is_initialized())\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == ["0", "False", "True", "False"], result.stderr
