"""Compile recorded launches for a chip that need not be here, and read what the assembler says of them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpeft.kernels._launch import Launch

# Bytes of shared memory that one program may have, by compute capability (CUDA C++ programming guide, table of
# technical specifications).
SHARED_LIMIT = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
_ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Compiled:
    """What one launch became.

    Attributes:
        name: of the kernel.
        capability: 90 for sm_90.
        registers: a thread.
        spills: bytes a thread that do not fit into registers, stores and loads together.
        shared: bytes a program.
        tensor_cores: names of the matrix instructions in its code, "wgmma" or "mma".
    """

    name: str
    capability: int
    registers: int
    spills: int
    shared: int
    tensor_cores: tuple[str, ...]


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compile as the chip's own just-in-time compilation would, and assemble with its resource report."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = _specialise(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    report = _assemble(ptx, capability)
    found = re.search(r"Used (\d+) registers", report)
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    if not found or not spilled:
        raise RuntimeError(f"{launch.name}: the assembler's report has another form than known: {report[:300]}")
    kinds = (("wgmma", "wgmma.mma_async"), ("tcgen05", "tcgen05.mma"), ("mma", "mma.sync"))
    return Compiled(
        launch.name,
        capability,
        int(found[1]),
        int(spilled[1]) + int(spilled[2]),
        compiled.metadata.shared,
        tuple(kind for kind, mark in kinds if mark in ptx),
    )


def _specialise(launch: Launch) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Types, constants and alignments of the arguments, as `kernel[grid](...)` derives them."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name] if parameter.name in launch.arguments else parameter.default
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = f"*{_TYPES[value.dtype]}"
            attributes[(index,)] = _ALIGNED
        elif isinstance(value, bool):
            signature[parameter.name] = "i1"
        elif isinstance(value, int):
            if value == 1 and not parameter.do_not_specialize:
                signature[parameter.name], constants[(index,)] = "constexpr", 1
                continue
            signature[parameter.name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = _ALIGNED
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            raise TypeError(f"{launch.name}: no type for the argument {parameter.name} = {value!r}")
    return signature, constants, attributes


def _assemble(ptx: str, capability: int) -> str:
    """The report of ptxas about one kernel."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    tool = get_ptxas(capability)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        program = tool.path if hasattr(tool, "path") else tool[0]
        command = [program, "-v", f"--gpu-name={sm_arch_from_capability(capability)}", str(path), "-o", f"{path}.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ptxas failed: {done.stderr[-2000:]}")
    return done.stderr


def table(rows: list[tuple[str, Compiled]]) -> str:
    """One line a kernel and chip, under a header."""
    header = (
        f"{'kernel':<58} {'chip':>6} {'registers':>9} {'spills':>7} {'shared':>8} {'limit':>8}  matrix instructions"
    )
    lines = [header]
    for label, compiled in rows:
        limit = SHARED_LIMIT[compiled.capability]
        lines.append(
            f"{label:<58} {f'sm_{compiled.capability}':>6} {compiled.registers:>9} {compiled.spills:>7} "
            f"{compiled.shared:>8} {limit:>8}  {' '.join(compiled.tensor_cores) or '-'}"
        )
    return "\n".join(lines)
