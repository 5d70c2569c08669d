"""Several threads at once, several processes, and the fallback to lower instruction sets in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastpeft.native.vector import layer_norm, library, mlp, prompt_attention
from tests.native.conftest import HERE


def work(seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Something of every operator, on inputs that a seed draws."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    tokens = 20 + seed % 7
    q, k, v = random(2, tokens, 3, 3, 16).permute(2, 0, 3, 1, 4)
    pk, pv = random(2, 3, 5, 16)
    out, lse = prompt_attention.forward(q, k, v, pk, pv, scale=0.25)
    gradients = prompt_attention.backward(random(2, 3, tokens, 16), q, k, v, pk, pv, out, lse, scale=0.25)
    x, branch = random(2, 9, tokens, 40)
    y, s, mean, rstd = layer_norm.forward(x, None, None, 1e-6, branch=branch)
    dx, *_ = layer_norm.backward(random(9, tokens, 40), s, None, mean, rstd)
    kept = torch.empty(tokens, 33, dtype=dtype)
    a = mlp.activate_(random(tokens, 33), None, "gelu", kept)
    dz = mlp.differentiate_(random(tokens, 33), kept, "gelu")
    return [out, lse, *gradients, y, s, dx, a, dz]


@pytest.fixture
def two_threads():
    """Of torch's, so that the library uses as many."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_python_threads_do_not_disturb_each_other(level, two_threads, dtype):
    seeds = range(24)
    expected = [work(seed, dtype) for seed in seeds]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for found, right in zip(pool.map(lambda seed: work(seed, dtype), seeds), expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


def test_a_forked_child_may_go_on_with_one_thread(level, two_threads):
    expected = work(3)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        # The parent's threads are not here: more than one would wait for them forever.
        try:
            torch.set_num_threads(1)
            same = all(torch.equal(a, b) for a, b in zip(work(3), expected, strict=True))
            os.write(write, b"1" if same else b"0")
        finally:
            os._exit(0)
    os.close(write)
    assert _within(read, 60) == b"1", "the child computed something else, or hangs"
    os.waitpid(child, 0)
    os.close(read)
    assert all(torch.equal(a, b) for a, b in zip(work(3), expected, strict=True)), "the parent still can"


def _within(pipe: int, seconds: float) -> bytes:
    import select

    ready, _, _ = select.select([pipe], [], [], seconds)
    return os.read(pipe, 1) if ready else b""


class _Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return work(index)[0]


def test_data_loaders_workers(two_threads):
    expected = [work(index)[0] for index in range(4)]
    loader = torch.utils.data.DataLoader(
        _Samples(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    assert all(torch.equal(a, b) for a, b in zip(loader, expected, strict=True))


_SCRIPT = """
import sys, torch
from fastpeft import _native
from fastpeft.native.vector import library
from tests.native.test_threads import work
assert _native.cpu_level() == library.level() == sys.argv[1]
torch.save(work(5), sys.argv[2])
"""


@pytest.mark.parametrize("name", HERE)
def test_the_environment_lowers_the_instruction_set(name, tmp_path, monkeypatch):
    file = tmp_path / "found.pt"
    environment = os.environ | {"FASTPEFT_CPU_LEVEL": name}
    subprocess.run([sys.executable, "-c", _SCRIPT, name, str(file)], env=environment, check=True, timeout=120)
    monkeypatch.setattr(library, "level", lambda: name)
    assert all(torch.equal(a, b) for a, b in zip(torch.load(file), work(5), strict=True))
