"""Compile every Triton kernel for chips that need not be here: `python -m bench.kernels [OPERATOR ...]`.

Prints registers, spills, shared memory and the matrix instructions of each kernel with the launch choices that the chip
would get, and exits with 1 if one spills, asks for more shared memory than the chip has, or multiplies matrices without
tensor cores. Compiling shows that a kernel can run, not that it is right or fast there. `--candidates` compiles what
tuning would measure besides (`kernels/_tune.py`), for the cases that an operator names in `CANDIDATES`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from fastpeft._serve import serve

if TYPE_CHECKING:
    from fastpeft.kernels._compile import Compiled
    from fastpeft.kernels._launch import Launch

CHIPS = (80, 90, 100)


def operators() -> list[str]:
    """Operators with cases, by name."""
    from bench import kernel_cases

    return sorted(module.name for module in pkgutil.iter_modules(kernel_cases.__path__))


def cases_of(operator: str) -> dict[str, Callable[[], object]]:
    """Label -> function that launches on meta tensors."""
    return importlib.import_module(f"bench.kernel_cases.{operator}").CASES


def candidate_cases_of(operator: str) -> dict[str, Callable[[], object]]:
    """The cases that show which candidates there are."""
    names = importlib.import_module(f"bench.kernel_cases.{operator}").CANDIDATES
    return {name: cases_of(operator)[name] for name in names}


def _compiled_as(launch: Launch) -> str:
    """What distinguishes kernels that a chip compiles apart; sizes do so by being one or divisible."""
    arguments = [
        f"{name}={getattr(value, 'dtype', value)}"
        for name, value in launch.arguments.items()
        if isinstance(value, (bool, str, float, torch.Tensor)) or value is None or name.isupper()
    ]
    return " ".join([launch.name, *arguments, f"warps={launch.num_warps} stages={launch.num_stages}"])


def _blocks_of(launch: Launch) -> str:
    """The launch choice in a few words."""
    sizes = [str(value) for name, value in launch.arguments.items() if name.startswith(("BLOCK", "ROWS"))]
    return f"{'x'.join(sizes)} w{launch.num_warps} s{launch.num_stages}"


def inspect(
    operator: str, chips: tuple[int, ...], candidates: bool = False
) -> Iterator[tuple[str, Compiled, list[str]]]:
    """(label, compiled kernel, complaints) of each launch of an operator's cases, or of the candidates besides."""
    from fastpeft.kernels import _compile
    from fastpeft.kernels._launch import recording

    seen: set[tuple[int, str]] = set()
    for label, case in (candidate_cases_of if candidates else cases_of)(operator).items():
        for chip in chips:
            with recording(chip, candidates) as launches:
                case()
            for launch in launches:
                if candidates:
                    form = (chip, _compiled_as(launch))
                    if form in seen:
                        continue
                    seen.add(form)
                    label_of = f"{launch.name}: {_blocks_of(launch)}"
                else:
                    label_of = f"{launch.name}: {label}"
                compiled = _compile.compile_launch(launch, chip)
                complaints = []
                if compiled.spills:
                    complaints.append(f"spills {compiled.spills} bytes a thread")
                if compiled.shared > _compile.SHARED_LIMIT[chip]:
                    complaints.append(f"wants {compiled.shared} bytes of shared memory")
                if "tl.dot" in launch.kernel.src and not compiled.tensor_cores:
                    complaints.append("multiplies matrices without tensor cores")
                yield label_of, compiled, complaints


def main(arguments: list[str] | None = None) -> int:
    """Print the table and return 1 if a kernel should not run as it is."""
    parser = argparse.ArgumentParser(prog="bench.kernels", description="Compile the Triton kernels and report on them.")
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help="all by default")
    parser.add_argument("--chips", type=int, nargs="+", default=CHIPS, metavar="CC", help="compute capabilities, as 90")
    parser.add_argument("--candidates", action="store_true", help="what tuning would measure besides")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.operators) - set(operators()))
    if unknown:
        parser.error(f"no operator {', '.join(unknown)}; there are {', '.join(operators())}")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set, and interpreted kernels are not compiled")
    return serve(lambda: _serve(options))


def _serve(options: argparse.Namespace) -> int:
    from fastpeft.kernels import _compile

    rows, wrong = [], []
    for operator in options.operators or operators():
        for label, compiled, complaints in inspect(operator, tuple(options.chips), options.candidates):
            rows.append((label, compiled))
            wrong += [f"{label} on sm_{compiled.capability}: {complaint}" for complaint in complaints]
    print(_compile.table(rows))
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
