"""The native library under AddressSanitizer and UndefinedBehaviorSanitizer, on shapes with every kind of tail.

The library is built anew with both and used by a process of its own, whose report is shown if there is one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fastpeft import _native
from tests.native.conftest import HERE

ROOT = Path(__file__).resolve().parents[2]
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1"

pytestmark = pytest.mark.slow


def runtime(name: str) -> str | None:
    """Path of a library of the compiler's."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return found if os.path.isabs(found) else None


@pytest.fixture(scope="module")
def instrumented(tmp_path_factory) -> Path:
    """The library, built with the sanitizers."""
    if runtime("libasan.so") is None:
        pytest.skip("the compiler has no AddressSanitizer")
    pytest.importorskip("ninja")
    folder = tmp_path_factory.mktemp("sanitized")
    environment = os.environ | {"CXXFLAGS": FLAGS, "LDFLAGS": "-fsanitize=address,undefined", "FASTPEFT_NATIVE": "1"}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "temp"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder / "lib" / "fastpeft" / "libfastpeft_cpu.so"


_PRELUDE = """
import sys
from pathlib import Path
from fastpeft import _native
_native.LIBRARY = Path(sys.argv[1])
import os
import torch
torch.set_num_threads(2)
assert _native.cpu_level() == sys.argv[2], _native.cpu_level()
"""

_OPERATORS = """
import random
from tests.native import test_random_shapes as shapes
from tests.native.test_threads import work
names = [name for name in shapes.DRAWS if sys.argv[2] == "amx" or not name.startswith("amx")]
for name in names:
    for seed in range(40):
        torch.manual_seed(seed)
        random.seed(seed)
        shapes.DRAWS[name]()
if sys.argv[2] == "amx":
    # Whatever else the matrix unit has functions for.
    from tests.native import test_gemm, test_operand
    for rows in (1, 33, 77):
        test_gemm.test_gradients_of_factors(rows)
        test_gemm.test_residual(rows)
        test_gemm.test_two_residuals(rows)
        test_operand.test_sums_over_rows(rows, 2)
        test_operand.test_gradient_of_a_weight(rows, 64, 96)
        test_operand.test_backward_of_a_layer_norm_that_is_trained(rows, torch.bfloat16)
    for rows, width in ((1, 32), (45, 96)):
        test_gemm.test_layer_norm_backward(rows, width)
    test_operand.test_gradient_of_a_weight_behind_a_layer_norm(True)
    test_operand.test_weights_are_packed_as_one_number_after_another(64, 160, torch.float32)
    test_gemm.test_packing_folds_scales_and_fills_up()
    for depth in (96, 1056):
        test_gemm.test_low_rank_terms_as_steps_of_depth(depth, 32)
work(1)
work(2, torch.bfloat16)
print("done")
"""

_OUT_OF_BOUNDS = """
import ctypes
from fastpeft.native.vector import mlp
# A row more than there is.
z = torch.randn(64, 64)
arguments = mlp._structure(z, "gelu", keep=0)
arguments.rows = 1 << 16
mlp.call("mlp_forward", arguments)
"""


def run(library: Path, level: str, script: str) -> subprocess.CompletedProcess:
    """A script in a process that has the sanitizers from its start."""
    # Python's own memory is not looked at, nor what it leaves behind; torch's library of C++ comes before the
    # sanitizer's interceptors of its exceptions otherwise.
    environment = os.environ | {
        "LD_PRELOAD": " ".join(filter(None, map(runtime, ("libasan.so", "libubsan.so", "libstdc++.so")))),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "FASTPEFT_CPU_LEVEL": level,
        "PYTHONMALLOC": "malloc",
        "TRITON_INTERPRET": "1",
    }
    code = _PRELUDE + textwrap.dedent(script)
    return subprocess.run(
        [sys.executable, "-c", code, str(library), level],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )


# Without vector units everything takes several times as long.
@pytest.mark.parametrize("level", [pytest.param(HERE[0], marks=pytest.mark.exhaustive), *HERE[1:]])
def test_every_function_keeps_to_its_memory(instrumented, level):
    if level == "amx" and not _native.request_amx():
        pytest.skip("the operating system does not grant the matrix unit")
    done = run(instrumented, level, _OPERATORS)
    assert done.returncode == 0 and done.stdout.strip().endswith("done"), done.stderr[-6000:]


def test_what_does_not_is_reported(instrumented):
    done = run(instrumented, "none", _OUT_OF_BOUNDS)
    assert done.returncode != 0 and "ERROR: AddressSanitizer" in done.stderr
