"""Building the CUDA kernels with nvcc, without a GPU: they compile, link, load and keep variables in registers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.cuda.emulation import ROOT

pytestmark = pytest.mark.slow

# The environment variable by which `make test-slow` says where nvcc must be.
HOME = "FASTPEFT_TEST_NVCC"
CHIPS = ("8.0", "9.0a", "10.0")
# Kernel -> template arguments beside the element type.
KERNELS = {
    "prompt_attention forward_kernel": ("32", "64", "80", "96", "128"),
    "prompt_attention statistics_kernel": ("32", "64", "80", "96", "128"),
    "prompt_attention query_gradient_kernel": ("32", "64", "80", "96", "128"),
    "prompt_attention key_gradient_kernel": ("32", "64", "80", "96", "128"),
    "prompt_attention prompt_sum_kernel": ("",),
    "adapter forward_kernel": ("16", "32", "64", "96", "128"),
    "adapter backward_kernel": ("16", "32", "64", "96", "128"),
}


@dataclass(frozen=True)
class Report:
    """What ptxas says of one kernel on one chip."""

    chip: str
    kernel: str
    element: str
    size: str
    registers: int
    spilled: int
    stack: int
    shared: int


def reports(log: str) -> Iterator[Report]:
    """The kernels in nvcc's output with -Xptxas -v."""
    entries = log.split("Compiling entry function ")[1:]
    for entry in entries:
        name, chip = re.match(r"'(\S+)' for 'sm_(\w+)'", entry).groups()
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
        ).groups()
        used = re.search(r"Used (\d+) registers(.*)", entry)
        shared = re.search(r"(\d+) bytes smem", used.group(2))
        family = "adapter" if "adapter_cu" in name else "prompt_attention"
        kernel = re.search(r"\d+([a-z_]+_kernel)I", name).group(1)
        size = re.search(r"Li(\d+)E", name)
        yield Report(
            chip,
            f"{family} {kernel}",
            re.search(r"_4(Bf16|Fp16)", name).group(1),
            size.group(1) if size else "",
            int(used.group(1)),
            int(stores) + int(loads),
            int(stack),
            int(shared.group(1)) if shared else 0,
        )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(the library, what the build said), built by setup.py in a temporary folder."""
    home = os.environ.get(HOME)
    folder = tmp_path_factory.mktemp("cuda")
    checkout = folder / "checkout"
    for name in ("fastpeft", "kernels", "csrc"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, checkout)
    result = subprocess.run(
        [
            sys.executable,
            "setup.py",
            "build_ext",
            "--build-lib",
            str(folder / "lib"),
            "--build-temp",
            str(folder / "o"),
        ],
        cwd=checkout,
        env={
            **os.environ,
            "FASTPEFT_CUDA": "1",
            "FASTPEFT_CUDA_ARCHS": ";".join(CHIPS),
            "FASTPEFT_NATIVE": "0",
            "MAX_JOBS": "2",
            "NVCC_APPEND_FLAGS": "-Xptxas -v",
            **({"CUDA_HOME": home} if home else {}),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    log = result.stdout
    if result.returncode != 0 and "nvcc was not found" in log:
        assert not home, f"no nvcc in {home}, where {HOME} says it is"
        pytest.skip("needs nvcc: a CUDA toolkit, or csrc/cuda/requirements.txt as make test-slow installs it")
    assert result.returncode == 0, log
    return folder / "lib" / "fastpeft" / "libfastpeft_cuda.so", log


def shared_memory(emulator) -> dict[tuple[str, str], int]:
    """(kernel, size) -> bytes of shared memory that a block is launched with."""
    found = {}
    for dim in KERNELS["prompt_attention forward_kernel"]:
        x = torch.ones(1, 1, 2, int(dim), dtype=torch.bfloat16)
        out, lse = emulator.attention_forward(x, x, x, x[0], x[0], 1.0, False)
        found["prompt_attention forward_kernel", dim] = emulator.shared_memory[0]
        emulator.attention_backward(x, x, x, x, x[0], x[0], out, lse, 1.0, False)
        for name, size in zip(("statistics", "query_gradient", "key_gradient"), emulator.shared_memory, strict=False):
            found[f"prompt_attention {name}_kernel", dim] = size
    for hidden in KERNELS["adapter forward_kernel"]:
        x, factor = torch.ones(1, 8, dtype=torch.bfloat16), torch.ones(int(hidden), 8, dtype=torch.bfloat16)
        factors = (factor, None, factor.t().contiguous())
        emulator.adapter_forward(x, *factors, None, None, 0, 1.0)
        found["adapter forward_kernel", hidden] = emulator.shared_memory[0]
        emulator.adapter_backward(x, x, *factors, None, 0, 1.0)
        found["adapter backward_kernel", hidden] = emulator.shared_memory[0]
    return found


def test_no_kernel_spills(built, emulator):
    _, log = built
    assert not re.findall(r".*\bwarning\b.*", log), "compilers warn of nothing"
    found = list(reports(log))
    launched = shared_memory(emulator)
    print(f"\n{'kernel':<40}{'size':>5} {'type':<5}{'chip':>6}{'registers':>10}{'spilled':>8}{'stack':>6}{'shared':>7}")
    for r in sorted(found, key=lambda r: (r.kernel, r.size.zfill(3), r.element, r.chip.zfill(4))):
        line = f"{r.kernel:<40}{r.size:>5} {r.element:<5}{r.chip:>6}"
        print(f"{line}{r.registers:>10}{r.spilled:>8}{r.stack:>6}{launched.get((r.kernel, r.size), 0):>7}")
    chips = [chip.replace(".", "") for chip in CHIPS]
    expected = {
        (chip, kernel, element, size)
        for kernel, sizes in KERNELS.items()
        for size in sizes
        for element in ("Bf16", "Fp16")
        for chip in chips
    }
    assert {(r.chip, r.kernel, r.element, r.size) for r in found} == expected and len(found) == len(expected)
    assert not [r for r in found if r.spilled or r.stack or r.shared], "what is in shared memory is asked for at launch"


LOAD = """
import sys
from pathlib import Path
import torch
from fastpeft import _cuda

_cuda.LIBRARY = Path(sys.argv[1])
print(_cuda.status())
print([_cuda.unavailable(chip) is None for chip in (80, 86, 90, 100, 103, 120)], torch.cuda.is_initialized())
try:
    x = torch.zeros(2, 8, dtype=torch.bfloat16)
    _cuda.library().adapter_forward(x, torch.zeros(8, 8), None, torch.zeros(8, 8), None, None, 0, 1.0)
except NotImplementedError as error:
    print("CUDA" in str(error) and "CPU" in str(error))
for name in ("prompt_attention_forward", "prompt_attention_backward", "adapter_forward", "adapter_backward"):
    print(getattr(_cuda.library(), name).default._schema)
"""


def test_it_loads_without_a_gpu_and_has_the_schemas_that_were_emulated(built, compiled):
    library, _ = built
    result = subprocess.run([sys.executable, "-c", LOAD, str(library)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    status, chips, refused, *schemas = result.stdout.splitlines()
    assert status == f"loaded from {library}, for compute capabilities 8.0 9.0a 10.0"
    assert chips == "[True, True, True, True, True, True] False" and refused == "True"
    names = (schema.split("(")[0].split("::")[1] for schema in schemas)
    emulated = [str(getattr(compiled.operators, name).default._schema) for name in names]
    assert schemas == [schema.replace("fastpeft_cuda_emulated", "fastpeft_cuda") for schema in emulated]


def test_it_needs_no_other_library_of_cuda(built):
    """The runtime is linked in, and nothing of it is shown to others."""
    library, _ = built
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    listed = subprocess.run(
        ["readelf", "-dW", "--dyn-syms", library], capture_output=True, text=True, check=True
    ).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", listed))
    assert "libtorch_cpu.so" in needed and not [name for name in needed if "cuda" in name or "python" in name]
    defined = re.findall(r"(?:GLOBAL|WEAK)\s+DEFAULT\s+\d+\s+(\S+)", listed)
    assert "fastpeft_cuda_interface" in defined and not [name for name in defined if re.match("cuda|__cuda", name)]


def test_size(built):
    """Bytes: machine code for three chips and PTX for one, and the runtime; more would be a template too many."""
    assert Path(built[0]).stat().st_size < 16 << 20
