"""Importing fastpeft does nothing but define names, installed or not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = ("timm", "transformers", "triton", "deepspeed", "peft", "pydantic", "yaml", "PIL", "torchvision", "rich")


def run(code: str, cwd: Path = ROOT) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_optional_packages_stay_out():
    code = f"""
import importlib, sys, torch
before = set(sys.modules)
for module in ("fastpeft", "fastpeft.models", "fastpeft.models.build", "fastpeft.data"):
    importlib.import_module(module)
    found = [name for name in {OPTIONAL} if name in sys.modules and name not in before]
    if found:
        print(module, found)
"""
    assert run(code) == ""


def test_families_load_no_model_of_theirs():
    code = """
import sys, fastpeft
from fastpeft.models.families import families
print(families(), sorted(name for name in sys.modules if name in ("timm", "fastpeft.models.mplug")))
"""
    assert run(code) == "[] []"


def test_cuda_is_not_started():
    assert run("import torch, fastpeft, fastpeft._native; print(torch.cuda.is_initialized())") == "False"


def test_no_environment_variable_is_read():
    """Reads are recorded with the file they come from; those of other packages are their own."""
    code = """
import os, sys, torch, numpy
read = []
class Recorder(type(os.environ)):
    def __getitem__(self, key):
        frame, files = sys._getframe(1), []
        while frame and frame.f_code.co_filename in (os.__file__, "<frozen os>", "<frozen _collections_abc>"):
            frame = frame.f_back
        read.append((key, frame.f_code.co_filename))
        return super().__getitem__(key)
os.environ.__class__ = Recorder
os.environ.get("CHECK_THAT_THE_RECORDER_RECORDS")
import fastpeft, fastpeft.info, fastpeft.kernels, fastpeft.data, fastpeft.models.build
assert len(read) >= 1
folder = os.path.dirname(fastpeft.__file__)
print([entry for entry in read if entry[1].startswith(folder)])
"""
    assert run(code) == "[]"


def test_native_library_is_not_opened():
    assert run("import fastpeft, fastpeft._native as native; print(native._open.cache_info().currsize)") == "0"


def test_bare_checkout(tmp_path):
    """A checkout that is not installed works, with the kernels that lie beside the package."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "fastpeft", tmp_path / "fastpeft", ignore=ignore)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=ignore)
    (tmp_path / "kernels" / "probe.py").write_text("import fastpeft.kernels\nVALUE = 7\n")
    code = """
import fastpeft, fastpeft.kernels
from fastpeft.kernels import probe
print(fastpeft.__file__, fastpeft.kernels.__file__, fastpeft.kernels.__doc__ is not None, probe.VALUE, sep="|")
"""
    package, kernels, documented, value = run(code, tmp_path).split("|")
    assert Path(package) == tmp_path / "fastpeft" / "__init__.py"
    assert Path(kernels) == tmp_path / "kernels" / "__init__.py"
    assert (documented, value) == ("True", "7")


def test_checkout_without_kernels_says_where_it_looked(tmp_path):
    shutil.copytree(ROOT / "fastpeft", tmp_path / "fastpeft", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    code = """
try:
    import fastpeft.kernels
except ModuleNotFoundError as error:
    print(error.name, error, sep="|")
"""
    name, message = run(code, tmp_path).split("|")
    assert name == "fastpeft.kernels"
    assert str(tmp_path / "kernels") in message
