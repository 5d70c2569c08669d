"""Building and installing: the native library is compiled where that is possible, and never missed where it is not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest

from fastpeft import _native, _sources

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "fastpeft/libfastpeft_cpu.so"
needs_compiler = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not any(map(shutil.which, ("c++", "g++", "clang++"))),
    reason="needs a C++ compiler on Linux",
)
HIDE_TORCH = """
import importlib.util, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find(name, *rest)
sys.argv = ["setup.py", *sys.argv[1:]]
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.fixture
def checkout(tmp_path):
    folder = tmp_path / "checkout"
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("fastpeft", "kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("pyproject.toml", "setup.py", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    return folder


def build_wheel(checkout: Path, *, script: tuple[str, ...] = ("setup.py",), **environment: str):
    """Build without pip, which would hide the warnings; returns the process and the wheel."""
    result = subprocess.run(
        [sys.executable, *script, "-q", "bdist_wheel", "--dist-dir", "dist"],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    return result, next(iter((checkout / "dist").glob("*.whl")), None)


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def record(wheel: Path) -> int:
    """The number of the sources that a wheel's Python code belongs to."""
    with zipfile.ZipFile(wheel) as archive:
        return int(archive.read("fastpeft/_sources.txt"), 16)


@needs_compiler
# Unoptimised in a quarter of the time.
@pytest.mark.parametrize(
    "compiler, flags",
    [(None, "-O0"), pytest.param(None, "", marks=pytest.mark.slow), pytest.param("gcc", "", marks=pytest.mark.slow)],
)
def test_wheel_with_native_library(checkout, compiler, flags):
    if compiler and not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    result, wheel = build_wheel(checkout, CXXFLAGS=flags, **({"CXX": compiler} if compiler else {}))
    assert result.returncode == 0, result.stderr
    assert "without its native library" not in result.stderr
    names = contents(wheel)
    assert "-py3-none-linux_" in wheel.name
    assert LIBRARY in names
    assert "fastpeft/kernels/__init__.py" in names
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastpeft").rglob("*.py")}
    assert modules <= names, "every module of the checkout is in the wheel"
    assert record(wheel) == _sources.number(ROOT / "csrc" / "cpu")
    # Installed, where there is no csrc: the library is the one that belongs to the Python code.
    installed = checkout.parent / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    code = "from fastpeft import _native; print(_native._sources.FOLDER.exists(), _native.status())"
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=installed,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    settings = {name: os.environ.get(name) for name in ("CXX", "CXXFLAGS", "LDFLAGS", "PATH", "LD_LIBRARY_PATH")}
    assert said.stdout.startswith(f"False loaded from {installed}"), f"{said.stdout}{said.stderr}{settings}"
    assert not {name for name in names if name.split("/")[0] in ("tests", "bench", "csrc", "kernels", "configs")}
    # Of a function that several files had in common the linker would keep one, of any instruction set.
    assert not any(map(shared_functions, (checkout / "build").rglob("*[0-9]_*.o")))


def shared_functions(compiled: Path) -> list[str]:
    """What a file compiled for several instruction sets leaves to the linker to choose."""
    symbols = subprocess.run(["nm", "-C", str(compiled)], capture_output=True, text=True, check=True).stdout
    if "_amx\n" in symbols:
        return []
    return re.findall(r" [WV] (fastpeft::.*)", symbols)


@pytest.mark.parametrize("cause", ["compiler fails", "no compiler", "no torch"])
def test_without_native_library_is_one_warning(checkout, cause):
    if cause == "no torch":
        result, wheel = build_wheel(checkout, script=("-c", HIDE_TORCH))
        reason = "--no-build-isolation"
    else:
        compiler = {"compiler fails": "false", "no compiler": "a-compiler-that-is-not-there"}[cause]
        result, wheel = build_wheel(checkout, CXX=compiler)
        reason = {"compiler fails": "the compiler failed", "no compiler": "install g++"}[cause]
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("without its native library") == 1
    assert reason in result.stderr
    assert LIBRARY not in contents(wheel)
    assert "fastpeft/__init__.py" in contents(wheel)


def test_native_library_asked_for_must_build(checkout):
    result, wheel = build_wheel(checkout, CXX="false", FASTPEFT_NATIVE="1")
    assert result.returncode != 0
    assert wheel is None
    assert "FASTPEFT_NATIVE=1" in result.stderr


def test_native_library_not_wanted_is_silent(checkout):
    result, wheel = build_wheel(checkout, FASTPEFT_NATIVE="0")
    assert result.returncode == 0, result.stderr
    assert "native library" not in result.stderr
    assert "-py3-none-any" in wheel.name
    assert LIBRARY not in contents(wheel)
    assert record(wheel) == _sources.number(checkout / "csrc" / "cpu")


def test_info_names_everything():
    result = subprocess.run(
        [sys.executable, "-m", "fastpeft.info"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    for word in ("fastpeft", "torch", "native library", "features", "cuda", "timm", "deepspeed"):
        assert word in result.stdout


@pytest.fixture
def reopened(monkeypatch):
    """Forget what was opened, before and after."""

    def forget():
        _native._open.cache_clear()
        _native.cpu_features.cache_clear()
        _native.cpu_level.cache_clear()

    forget()
    yield monkeypatch
    monkeypatch.undo()
    forget()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="compares with Linux's own list")
def test_native_features_agree_with_the_kernel():
    if _native.library() is None:
        pytest.skip(f"native library {_native.status()}")
    assert _native.cpu_features() == _native._listed_features(Path("/proc/cpuinfo"))


def test_request_amx_is_granted_where_it_is_listed():
    expected = _native.library() is not None and "amx_tile" in _native.cpu_features()
    assert _native.request_amx() == expected


class Built:
    """A library in whose build a compiler did not know some instruction sets."""

    def __init__(self, lacks: tuple[str, ...]):
        self._lacks = lacks

    def fastpeft_cpu_request_amx(self) -> int:
        return 1

    def __getattr__(self, name: str):
        if name.endswith(self._lacks):
            raise AttributeError(f"undefined symbol: {name}")
        return object()


@pytest.mark.parametrize(
    "lacks, said, level",
    [
        (("_amx",), "amx", "avx512"),
        # The matrix unit does not go without what runs beside it.
        (("_avx512",), "avx512, amx", "avx2"),
        (("_avx2", "_avx512", "_amx"), "avx2, avx512, amx", "none"),
        ((), "", "amx"),
    ],
)
def test_a_level_that_was_not_built_is_not_used(reopened, lacks, said, level):
    reopened.delenv(_native.LEVEL_VARIABLE, raising=False)
    reopened.setattr(_native, "_open", lambda: (Built(lacks), "loaded"))
    reopened.setattr(_native, "cpu_features", lambda: frozenset(_native.FEATURES))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [_native.cpu_level() for _ in range(3)] == [level] * 3
    assert _native.status() == (f"loaded, built without {said}" if said else "loaded")
    assert len(caught) == bool(said)
    if said:
        assert f"built without {said}, which this CPU has; it goes on with {level}" in str(caught[0].message)
    _native.cpu_level.cache_clear()
    reopened.setenv(_native.LEVEL_VARIABLE, "amx")
    if lacks:
        with pytest.raises(ValueError, match="FASTPEFT_CPU_LEVEL=amx: this CPU runs none"):
            _native.cpu_level()
    else:
        assert _native.cpu_level() == "amx"


def test_what_the_compiler_may_use_is_asked_of_the_cpu():
    """Every option of setup.py for an instruction set is a feature that its level needs."""
    source = (ROOT / "setup.py").read_text()
    options = re.search(r"^_AVX512 = .*?^LEVEL_FLAGS = .*?^}", source, re.DOTALL | re.MULTILINE)[0]
    used = {name.replace("-", "") for name in re.findall(r'"-m([a-z0-9-]+)"', options)}
    assert used == {name.replace("_", "") for name in _native.LEVELS["amx"]}
    wide = re.search(r"^_AVX512 = .*", options, re.MULTILINE)[0]
    assert set(re.findall(r'"-m([a-z0-9]+)"', wide)) == _native.LEVELS["avx512"]


def test_features_without_native_library(reopened, tmp_path):
    reopened.setattr(_native, "LIBRARY", tmp_path / "absent.so")
    assert _native.library() is None
    assert "not built" in _native.status()
    assert _native.cpu_features() == _native._listed_features(Path("/proc/cpuinfo"))
    assert not _native.request_amx()


def test_listing_is_read_by_name(reopened, tmp_path):
    listing = tmp_path / "cpuinfo"
    listing.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512f amx_tile\n\nflags\t\t: fpu\n")
    reopened.setattr(_native.platform, "machine", lambda: "x86_64")
    assert _native._listed_features(listing) == {"avx2", "avx512f", "amx_tile"}
    assert _native._listed_features(tmp_path / "absent") == frozenset()
    reopened.setattr(_native.platform, "machine", lambda: "aarch64")
    assert _native._listed_features(listing) == frozenset()


def test_damaged_library_is_one_warning(reopened, tmp_path):
    damaged = tmp_path / "libfastpeft_cpu.so"
    damaged.write_bytes(b"not a shared library")
    reopened.setattr(_native, "LIBRARY", damaged)
    with pytest.warns(RuntimeWarning, match="without its native CPU library") as caught:
        for _ in range(3):
            assert _native.library() is None
    assert len(caught) == 1
    assert "cannot be loaded" in _native.status()


@pytest.mark.parametrize("own", ["other sources", "unknown"])
def test_library_of_other_sources_is_refused(reopened, own):
    if _native.library() is None:
        pytest.skip(f"native library {_native.status()}")
    _native._open.cache_clear()
    number = _native._sources.expected() ^ 1 if own == "other sources" else None
    reopened.setattr(_native._sources, "expected", lambda: number)
    with pytest.warns(
        RuntimeWarning,
        match="which is unusable: built from other sources .*; rebuild it: python setup.py build_ext --inplace",
    ):
        assert _native.library() is None
    assert "\n" not in _native.status()
    with pytest.raises(RuntimeError, match="native library is unusable: built from other sources"):
        _native.function("fastpeft_gemm_amx")


@pytest.mark.parametrize("own", [None, 1])
def test_library_that_does_not_say_its_sources_is_refused(reopened, own):
    import _ctypes

    # As those were that counted their interface by hand.
    reopened.setattr(_native, "LIBRARY", Path(_ctypes.__file__))
    reopened.setattr(_native._sources, "expected", lambda: own)
    with pytest.warns(RuntimeWarning, match="built from other sources"):
        assert _native.library() is None


def test_library_of_this_checkout_is_up_to_date():
    """Otherwise every test of the native operators would be skipped, and nobody would know."""
    assert not _native.LIBRARY.exists() or _native.library() is not None, _native.status()


def test_number_of_sources(tmp_path):
    folder = tmp_path / "cpu"
    (folder / "vector").mkdir(parents=True)
    code = 'struct Call {\n  const void* x;  // (rows, width)\n  int64_t rows;\n};\nconst char* a = "// none";\n'
    file = folder / "vector" / "call.h"

    def number(text: str) -> int:
        file.write_text(text)
        return _sources.number(folder)

    first = number(code)
    assert 0 <= first < 2**64
    # What the compiler does not see does not make a library stale.
    assert number(code.replace("// (rows, width)", "// what it is given")) == first
    assert number("/* About\n   this. */\n" + code.replace("  int64_t", "\n\n\tint64_t")) == first
    # All else does: order, types, what only looks like a comment, where it is.
    changes = [("x;", "y;"), ("int64_t rows", "int32_t rows"), ("// none", "// some"), ("const void* x;", "")]
    assert len({first, *(number(code.replace(*change)) for change in changes)}) == len(changes) + 1
    number(code)
    file.rename(folder / "call.h")
    assert _sources.number(folder) != first
