"""Build fastpeft: the Python library always, and beside it the native CPU library where this machine can compile it.

The native library is optional. Where it cannot be built (pip's build isolation hides torch, there is no compiler, the
compiler fails) the install goes on without it after one warning, and `python -m fastpeft.info` says so later. The
environment variable FASTPEFT_NATIVE decides otherwise: 0 does not try, 1 fails where the build is not possible.

The CUDA kernels are built only where they are asked for, and then they must build:

    FASTPEFT_CUDA=1 pip install --no-build-isolation -e .

That needs nvcc (in $CUDA_HOME/bin, from the wheels of csrc/cuda/requirements.txt, on the path or in
/usr/local/cuda/bin) and no GPU. FASTPEFT_CUDA_ARCHS are the compute capabilities to compile for, "8.0;9.0a;10.0" if not
set, and PTX for the last of them that names no single chip. One library serves every Python, and every torch from 2.11
on, whichever of its builds is installed here. MAX_JOBS limits how many files are compiled at once.
"""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/**/*.cpp"))
HEADERS = sorted(str(path) for path in ROOT.glob("csrc/cpu/**/*.h"))
# By its path: fastpeft itself cannot be imported before it is installed.
_NUMBERS = runpy.run_path(str(ROOT / "fastpeft" / "_sources.py"))
SOURCES_NUMBER = _NUMBERS["number"](ROOT / "csrc" / "cpu")
CUDA_SOURCES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cuda/*.c*") if path.suffix != ".cuh")
CUDA_HEADERS = sorted(str(path) for path in [*ROOT.glob("csrc/cuda/*.cuh"), *ROOT.glob("csrc/cuda/*.h")])
CUDA_EXTENSION = "fastpeft.libfastpeft_cuda"
CUDA_ARCHS = "8.0;9.0a;10.0"
# A plain shared library, opened with ctypes: it needs no Python headers and serves every Python version. No -march:
# what a file may use beyond the baseline is chosen when it runs, so that one build serves every CPU.
COMPILE_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra"]

# Files of csrc/cpu/FOLDER are compiled once for each of these instruction sets, where the compiler knows it; they
# export their functions with the name of the set behind, and fastpeft/_native.py picks by what the CPU has.
_AVX512 = ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
LEVEL_FLAGS = {
    "vector": {"none": [], "avx2": ["-mavx2", "-mfma"], "avx512": _AVX512},
    "amx": {"amx": [*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]},
}

# The oldest torch that the library shall load under, as its stable ABI counts: 2.11.
TORCH_TARGET = "0x020b000000000000"


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


def understands(compiler: str, flags: list[str]) -> bool:
    """Whether the compiler makes code for this machine with these options."""
    command = [compiler, "-Werror", *flags, "-x", "c++", "-c", os.devnull, "-o", os.devnull]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


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


def wants_cuda() -> bool:
    """Whether the CUDA kernels are asked for."""
    return os.environ.get("FASTPEFT_CUDA") == "1"


def find_nvcc() -> str | None:
    """The CUDA compiler: $CUDA_HOME's if set, else that of this environment's wheels, the path or the usual folder."""
    if os.environ.get("CUDA_HOME"):
        return shutil.which("nvcc", path=f"{os.environ['CUDA_HOME']}/bin")
    package = importlib.util.find_spec("nvidia")
    roots = [] if package is None else package.submodule_search_locations
    wheels = os.pathsep.join(str(folder) for root in roots for folder in Path(root).glob("cu*/bin"))
    found = shutil.which("nvcc", path=wheels) if wheels else None
    return found or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def cuda_obstacle() -> str | None:
    """Why the CUDA kernels cannot be built here, or None if nothing is in the way."""
    if not sys.platform.startswith("linux"):
        return f"they are built on Linux only, this is {sys.platform}"
    if importlib.util.find_spec("torch") is None:
        return "torch cannot be imported by the build: install torch first, then use pip's --no-build-isolation"
    if find_ninja() is None:
        return "ninja was not found: pip install ninja"
    if find_compiler() is None:
        return "no C++ compiler was found: install g++, or set CXX"
    if find_nvcc() is None:
        return "nvcc was not found: install the CUDA toolkit or csrc/cuda/requirements.txt, or set CUDA_HOME"
    return None


def cuda_architectures() -> list[str]:
    """Compute capabilities to compile for, such as 9.0a."""
    found = re.split(r"[;,\s]+", os.environ.get("FASTPEFT_CUDA_ARCHS", "").strip() or CUDA_ARCHS)
    for name in found:
        if not re.fullmatch(r"\d+\.\d[af]?", name):
            raise SystemExit(f"fastpeft: FASTPEFT_CUDA_ARCHS names {name!r}, expected forms like 8.0 or 9.0a")
    return found


def cuda_targets(architectures: list[str]) -> list[str]:
    """Options of nvcc: machine code for each, and PTX of the last that later chips can run."""
    portable = [name for name in architectures if name[-1].isdigit()]
    options = []
    for name in architectures:
        number = name.replace(".", "")
        code = f"[sm_{number},compute_{number}]" if portable[-1:] == [name] else f"sm_{number}"
        options.append(f"-gencode=arch=compute_{number},code={code}")
    return options


class NativeBuild(build_ext):
    """Compiles with ninja: csrc/cpu into fastpeft/libfastpeft_cpu.so, csrc/cuda into fastpeft/libfastpeft_cuda.so."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        if ext.name == CUDA_EXTENSION:
            self._build_cuda(ext)
            return
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
        compiler = find_compiler()
        lines = [
            f"cxx = {compiler}",
            f"flags = {' '.join(COMPILE_FLAGS)} {os.environ.get('CXXFLAGS', '')}",
            "level =",
            "rule compile",
            "  command = $cxx $flags $level -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            # Its C++ library by name, for a $CXX that is the compiler of C, such as gcc.
            f"  command = $cxx -shared -fopenmp $in -o $out {os.environ.get('LDFLAGS', '')} -lstdc++",
        ]
        steps = []
        for source in ext.sources:
            levels = LEVEL_FLAGS.get(Path(source).parent.name)
            if levels is None:
                # Whatever has changed, this file is compiled anew and says so.
                numbered = f"-DFASTPEFT_SOURCES={SOURCES_NUMBER:#018x}u" if Path(source).name == "features.cpp" else ""
                steps.append((source, "compile", numbered))
                continue
            for level, flags in levels.items():
                if understands(compiler, flags):
                    steps.append((source, "compile", f"-DFASTPEFT_LEVEL={level} {' '.join(flags)}"))
        self._ninja(ext, lines, steps, stdout=subprocess.PIPE)

    def _build_cuda(self, ext: Extension) -> None:
        reason = cuda_obstacle()
        if reason is None:
            try:
                self._compile_cuda(ext)
                return
            except (OSError, subprocess.CalledProcessError) as error:
                reason = f"the compiler failed, see above: {error}"
        raise SystemExit(f"fastpeft: the CUDA kernels were asked for (FASTPEFT_CUDA=1), but {reason}")

    def _compile_cuda(self, ext: Extension) -> None:
        torch = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
        architectures = cuda_architectures()
        nvcc = find_nvcc()
        options = "-fPIC,-fvisibility=hidden"
        # The CUDA runtime is linked in and not shown to others, so that it need not be the one that torch brings.
        hidden = "-Xlinker --exclude-libs=ALL -Xlinker -Bsymbolic"
        # nvcc itself looks in lib64, which the wheels do not have.
        runtime = Path(nvcc).resolve().parent.parent / "lib"
        lines = [
            f"nvcc = {nvcc} -ccbin {find_compiler()}",
            f"flags = -std=c++17 -O3 -Xcompiler {options}",
            f"torch = -isystem {torch / 'include'} -DTORCH_TARGET_VERSION={TORCH_TARGET}",
            "rule compile",
            f"  command = $nvcc $flags $torch '-DFASTPEFT_ARCHITECTURES=\"{' '.join(architectures)}\"' "
            "-Xcompiler -Wall,-Wextra -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule compile_cuda",
            f"  command = $nvcc $flags {' '.join(cuda_targets(architectures))} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = $nvcc -shared -cudart static {hidden} $in -o $out -L{runtime} -L{torch / 'lib'} "
            "-ltorch_cpu -ldl",
        ]
        steps = [(source, "compile_cuda" if source.endswith(".cu") else "compile", "") for source in ext.sources]
        self._ninja(ext, lines, steps)

    def _ninja(
        self, ext: Extension, lines: list[str], steps: list[tuple[str, str, str]], stdout: int | None = None
    ) -> None:
        """Compile each source by its rule and with its own options, then link all of them by the rule of that name."""
        library = Path(self.get_ext_fullpath(ext.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(self.build_temp).resolve() / ext.name
        folder.mkdir(parents=True, exist_ok=True)
        objects = [f"{index}_{Path(source).stem}.o" for index, (source, _, _) in enumerate(steps)]
        for (source, rule, options), obj in zip(steps, objects, strict=True):
            lines.append(f"build {obj}: {rule} {_escape(ROOT / source)}")
            if options:
                lines.append(f"  level = {options}")
        lines.append(f"build {_escape(library)}: link {' '.join(objects)}")
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        jobs = [f"-j{os.environ['MAX_JOBS']}"] if os.environ.get("MAX_JOBS") else []
        subprocess.run(
            [find_ninja(), *jobs, "-C", str(folder)], check=True, text=True, stdout=stdout, stderr=subprocess.STDOUT
        )


class Package(build_py):
    """The Python files, and which sources they belong to: an installed package has no csrc to ask."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            record = Path(self.build_lib) / "fastpeft" / _NUMBERS["RECORD"].name
            record.write_text(f"{SOURCES_NUMBER:016x}\n")


class Wheel(bdist_wheel):
    """Tags the wheel by what can be in it: a library for any Python 3 on this platform, or Python code alone."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", "any" if obstacle() and not wants_cuda() else platform


def _escape(path: Path) -> str:
    """A path as ninja files want it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


extensions = [Extension("fastpeft.libfastpeft_cpu", SOURCES, depends=HEADERS, optional=True)]
if wants_cuda():
    extensions.append(Extension(CUDA_EXTENSION, CUDA_SOURCES, depends=CUDA_HEADERS))

kernel_packages = ["fastpeft.kernels"] + [f"fastpeft.kernels.{name}" for name in find_packages("kernels")]

setup(
    packages=find_packages(include=["fastpeft", "fastpeft.*"]) + kernel_packages,
    package_dir={"fastpeft": "fastpeft", "fastpeft.kernels": "kernels"},
    ext_modules=extensions,
    cmdclass={"build_py": Package, "build_ext": NativeBuild, "bdist_wheel": Wheel},
)
