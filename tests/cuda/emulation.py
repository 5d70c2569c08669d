"""The CUDA kernels on the CPU: csrc/cuda compiled against tests/cuda/emulator.h, called on torch tensors.

The kernels' own source runs, thread by thread; emulator.h says what is checked on the way. Times mean nothing.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import shutil
import subprocess
from ctypes import c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ("prompt_attention_forward", "prompt_attention_backward", "adapter")
ELEMENTS = {torch.bfloat16: 0, torch.float16: 1}


def compiler() -> str | None:
    """A C++ compiler, or None."""
    return next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)


class _Tensor(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("strides", c_int64 * 3))


_ATTENTION = "q k v prompt_k prompt_v out dout dq dk dv dprompt_k dprompt_v"
_ADAPTER = "x down down_bias up up_bias residual y dy dx dz h"


class _AttentionCall(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in "element heads queries tokens prompts head_dim causal".split()),
        *((name, c_int32) for name in ("shared_prompts", "processors")),
        ("scale", c_float),
        ("batch", c_int64),
        *((name, _Tensor) for name in _ATTENTION.split()),
        ("lse", c_void_p),
        ("workspace", c_void_p),
    )


class _AdapterCall(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in "element width hidden activation".split()),
        ("scale", c_float),
        ("rows", c_int64),
        *((name, _Tensor) for name in _ADAPTER.split()),
    )


def build(folder: Path, source: Path = ROOT / "csrc/cuda") -> Path:
    """Compile the kernels and their operators for the CPU into a library in the folder, all warnings being errors."""
    torch_folder = Path(torch.__file__).parent
    include = [f"-I{ROOT / 'tests/cuda'}", f"-I{source}", "-isystem", str(torch_folder / "include")]
    options = ["-std=c++17", "-O1", "-fPIC", "-DFASTPEFT_EMULATE", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    options += [f"-DTORCH_TARGET_VERSION={_torch_target()}", '-DFASTPEFT_ARCHITECTURES="8.0"']
    command = [compiler(), *options, *include]
    sources = [(name, ["-x", "c++", str(source / f"{name}.cu")]) for name in KERNELS]
    sources += [(path.stem, [str(path)]) for path in (source / "library.cpp", ROOT / "tests/cuda/harness.cpp")]
    running = [
        subprocess.Popen([*command, "-c", *inputs, "-o", str(folder / f"{name}.o")], stderr=subprocess.PIPE, text=True)
        for name, inputs in sources
    ]
    said = [process.communicate()[1] for process in running]
    assert not any(process.returncode for process in running) and not any(said), "\n".join(said)
    library, objects = folder / "libemulated.so", [str(folder / f"{name}.o") for name, _ in sources]
    torch_library = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    unfinished = library.with_suffix(".part")
    subprocess.run([compiler(), "-shared", *objects, "-o", str(unfinished), *torch_library], check=True)
    return unfinished.rename(library)


def _torch_target() -> str:
    """The oldest torch that the library is built for, as setup.py has it."""
    return re.search(r'TORCH_TARGET = "(\w+)"', (ROOT / "setup.py").read_text()).group(1)


class Emulator:
    """The compiled kernels.

    Attributes:
        operators: `torch.ops.fastpeft_cuda_emulated`, those of csrc/cuda/library.cpp on tensors of the CPU.
        conflicts: rows of matrix loads that shared a bank with another, in all calls of the methods so far.
    """

    def __init__(self, library: Path):
        torch.ops.load_library(str(library))
        self.operators = torch.ops.fastpeft_cuda_emulated
        self._library = ctypes.CDLL(str(library))
        self._library.emulate_message.restype = ctypes.c_char_p
        self._library.emulate_attention_workspace.restype = c_int64
        self._library.emulate_conflicts.restype = c_int64
        self.conflicts = 0

    @property
    def shared_memory(self) -> list[int]:
        """Bytes of shared memory a block, of every launch of the last call of a method."""
        return list(iter(map(self._library.emulate_shared, itertools.count()).__next__, -1))

    def _run(
        self, function: str, call: ctypes.Structure, tensors: dict[str, Tensor], outputs: tuple[str, ...], seed: int
    ):
        library = self._library
        library.emulate_forget()
        library.emulate_seed(ctypes.c_uint64(seed))
        for name, tensor in tensors.items():
            if tensor.numel() == 0:
                continue
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            size = (last + 1) * tensor.element_size()
            library.emulate_announce(c_void_p(tensor.data_ptr()), c_int64(size), int(name in outputs))
        failed = getattr(library, function)(ctypes.byref(call))
        self.conflicts += library.emulate_conflicts()
        if failed:
            raise RuntimeError(library.emulate_message().decode())

    def attention_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prompt_k: Tensor,
        prompt_v: Tensor,
        scale: float,
        causal: bool,
        seed: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """(out, lse) of prompt_attention_forward; tensors without rows for no prompts."""
        batch, heads, queries, dim = q.shape
        out = _poisoned(q.dtype, batch, queries, heads, dim).transpose(1, 2)
        lse = _poisoned(torch.float32, batch, heads, queries)
        tensors = {"q": q, "k": k, "v": v, "prompt_k": prompt_k, "prompt_v": prompt_v, "out": out}
        call = _attention_call(tensors, scale, causal)
        call.lse = lse.data_ptr()
        self._run("emulate_attention_forward", call, {**tensors, "lse": lse}, ("out", "lse"), seed)
        return out, lse

    def attention_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prompt_k: Tensor,
        prompt_v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        causal: bool,
        needs: tuple[bool, ...] = (True,) * 5,
        processors: int = 4,
        seed: int = 0,
    ) -> list[Tensor | None]:
        """Gradients of q, k, v, prompt_k, prompt_v, or None where not needed."""
        inputs = {"q": q, "k": k, "v": v, "prompt_k": prompt_k, "prompt_v": prompt_v, "out": out, "dout": dout}
        gradients = {}
        for name, need in zip(("q", "k", "v", "prompt_k", "prompt_v"), needs, strict=True):
            if need:
                *batch, heads, rows, dim = inputs[name].shape
                gradients[f"d{name}"] = _poisoned(q.dtype, *batch, rows, heads, dim).transpose(-2, -3)
        call = _attention_call({**inputs, **gradients}, scale, causal)
        call.lse = lse.data_ptr()
        call.processors = processors
        size = self._library.emulate_attention_workspace(ctypes.byref(call))
        workspace = _poisoned(torch.float32, size)
        call.workspace = workspace.data_ptr()
        tensors = {**inputs, **gradients, "lse": lse, "workspace": workspace}
        self._run("emulate_attention_backward", call, tensors, (*gradients, "workspace"), seed)
        return [gradients.get(f"d{name}") for name in ("q", "k", "v", "prompt_k", "prompt_v")]

    def adapter_forward(
        self,
        x: Tensor,
        down: Tensor,
        down_bias: Tensor | None,
        up: Tensor,
        up_bias: Tensor | None,
        residual: Tensor | None,
        activation: int,
        scale: float,
        seed: int = 0,
    ) -> Tensor:
        """Y of adapter_forward."""
        y = _poisoned(x.dtype, *x.shape)
        tensors = {
            "x": x,
            "down": down,
            "down_bias": down_bias,
            "up": up,
            "up_bias": up_bias,
            "residual": residual,
            "y": y,
        }
        self._adapter("emulate_adapter_forward", tensors, ("y",), activation, scale, seed)
        return y

    def adapter_backward(
        self,
        dy: Tensor,
        x: Tensor,
        down: Tensor,
        down_bias: Tensor | None,
        up: Tensor,
        add: Tensor | None,
        activation: int,
        scale: float,
        needs: tuple[bool, bool] = (True, True),
        seed: int = 0,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dx, dz, h) of adapter_backward; needs: dx, and dz with h."""
        dx = _poisoned(x.dtype, *x.shape) if needs[0] else None
        dz, h = (_poisoned(x.dtype, x.shape[0], down.shape[0]) if needs[1] else None for _ in range(2))
        tensors = {
            "x": x,
            "down": down,
            "down_bias": down_bias,
            "up": up,
            "residual": add,
            "dy": dy,
            "dx": dx,
            "dz": dz,
            "h": h,
        }
        self._adapter("emulate_adapter_backward", tensors, ("dx", "dz", "h"), activation, scale, seed)
        return dx, dz, h

    def _adapter(
        self, function: str, tensors: dict, outputs: tuple[str, ...], activation: int, scale: float, seed: int
    ):
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        x, down = tensors["x"], tensors["down"]
        call = _AdapterCall(ELEMENTS[x.dtype], x.shape[1], down.shape[0], activation, scale, x.shape[0])
        _fill(call, tensors)
        self._run(function, call, tensors, outputs, seed)


def _poisoned(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def _fill(call: ctypes.Structure, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        strides = (
            (0,) * (4 - tensor.dim()) + tuple(tensor.stride())[:-1] if tensor.dim() > 2 else (tensor.stride(0), 0, 0)
        )
        setattr(call, name, _Tensor(tensor.data_ptr(), (c_int64 * 3)(*strides)))


def _attention_call(tensors: dict[str, Tensor], scale: float, causal: bool) -> _AttentionCall:
    q, k, prompt_k = tensors["q"], tensors["k"], tensors["prompt_k"]
    batch, heads, queries, dim = q.shape
    tokens, prompts = k.shape[2], prompt_k.shape[-2]
    call = _AttentionCall(ELEMENTS[q.dtype], heads, queries, tokens, prompts, dim, int(causal))
    call.shared_prompts = int(prompt_k.dim() == 3)
    call.scale, call.batch = scale, batch
    _fill(call, tensors)
    return call
