"""Build fastpeft: the Python library always, and beside it the native CPU library where this machine can compile it.

The native library is optional. Where it cannot be built (pip's build isolation hides torch, there is no compiler, the
compiler fails) the install goes on without it after one warning, and `python -m fastpeft.info` says so later. Only
csrc/cpu is compiled here, never CUDA.

The environment variable FASTPEFT_NATIVE decides otherwise: 0 does not try, 1 fails where the build is not possible.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/*.cpp"))
HEADERS = sorted(str(path) for path in ROOT.glob("csrc/cpu/*.h"))
# A plain shared library, opened with ctypes: it needs no Python headers and serves every Python version. No -march:
# what a file may use beyond the baseline is chosen when it runs, so that one build serves every CPU.
COMPILE_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]


def find_ninja() -> str | None:
    """Path of the ninja program: the wheel's, also in an environment that is not activated, or the system's."""
    if importlib.util.find_spec("ninja") is not None:
        import ninja

        bundled = shutil.which("ninja", path=ninja.BIN_DIR)
        if bundled:
            return bundled
    return shutil.which("ninja")


def find_compiler() -> str | None:
    """The C++ compiler: $CXX if set, else the first usual name found."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, names) if path), None)


def obstacle() -> str | None:
    """Why the native library cannot be built here, or None if nothing is in the way."""
    if os.environ.get("FASTPEFT_NATIVE") == "0":
        return "FASTPEFT_NATIVE=0 was set"
    if not sys.platform.startswith("linux"):
        return f"it is built on Linux only, this is {sys.platform}"
    if importlib.util.find_spec("torch") is None:
        return "torch cannot be imported by the build: install torch first, then use pip's --no-build-isolation"
    if find_ninja() is None:
        return "ninja was not found: pip install ninja"
    if find_compiler() is None:
        return "no C++ compiler was found: install g++, or set CXX"
    return None


class NativeBuild(build_ext):
    """Compiles csrc/cpu with ninja into fastpeft/libfastpeft_cpu.so."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        reason = obstacle()
        if reason is None:
            try:
                self._compile(ext)
                return
            except (OSError, subprocess.CalledProcessError) as error:
                output = getattr(error, "stdout", None) or str(error)
                reason = f"the compiler failed:\n{output.strip()}"
        if os.environ.get("FASTPEFT_NATIVE") == "1":
            raise SystemExit(f"fastpeft: the native library was asked for (FASTPEFT_NATIVE=1), but {reason}")
        # A library left by an earlier build would be taken for this one's.
        stale = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        (stale / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        if os.environ.get("FASTPEFT_NATIVE") != "0":
            print(f"warning: fastpeft is installed without its native library: {reason}", file=sys.stderr)

    def _compile(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve() / ext.name
        folder.mkdir(parents=True, exist_ok=True)
        objects = [f"{Path(source).stem}.o" for source in ext.sources]
        lines = [
            f"cxx = {find_compiler()}",
            f"flags = {' '.join(COMPILE_FLAGS)} {os.environ.get('CXXFLAGS', '')}",
            "rule compile",
            "  command = $cxx $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = $cxx -shared $in -o $out {os.environ.get('LDFLAGS', '')}",
        ]
        for source, obj in zip(ext.sources, objects, strict=True):
            lines.append(f"build {obj}: compile {_escape(ROOT / source)}")
        lines.append(f"build {_escape(library)}: link {' '.join(objects)}")
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        subprocess.run(
            [find_ninja(), "-C", str(folder)],
            check=True,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )


class Wheel(bdist_wheel):
    """Tags the wheel by what can be in it: a library for any Python 3 on this platform, or Python code alone."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", "any" if obstacle() else platform


def _escape(path: Path) -> str:
    """A path as ninja files want it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


kernel_packages = ["fastpeft.kernels"] + [f"fastpeft.kernels.{name}" for name in find_packages("kernels")]

setup(
    packages=find_packages(include=["fastpeft", "fastpeft.*"]) + kernel_packages,
    package_dir={"fastpeft": "fastpeft", "fastpeft.kernels": "kernels"},
    ext_modules=[Extension("fastpeft.libfastpeft_cpu", SOURCES, depends=HEADERS, optional=True)],
    cmdclass={"build_ext": NativeBuild, "bdist_wheel": Wheel},
)
