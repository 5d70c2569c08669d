"""What the analyses' commands share: their parsers, and files that are written whole or not at all."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import torch
from matplotlib.figure import Figure

from bench.analyses.errors import AnalysisError, first_line
from fastpeft.saving.files import replace

SUFFIXES = (".png", ".svg", ".pdf")
# At which text of 8 points is sharp.
_DPI = 150


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """A command's parser, with the module's docstring as its help."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def at_least(name: str, value: int, least: int) -> None:
    """Refuse a number that is too small.

    Raises:
        AnalysisError: it is.
    """
    if value < least:
        raise AnalysisError(f"{name} must be at least {least}, got {value}")


def device_of(name: str | None) -> torch.device:
    """The device that was asked for; the GPU if there is one, else the CPU.

    Raises:
        AnalysisError: no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise AnalysisError(f"--device {name}: {first_line(error)}") from None
    return device


def folder(path: Path) -> Path:
    """A folder for results, made before anything is computed.

    Raises:
        AnalysisError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AnalysisError(f"{path}: cannot be a folder for results: {error.strerror or error}") from None
    return path


def picture(path: Path) -> Path:
    """The path of a picture, its folder made before anything is computed.

    Raises:
        AnalysisError: its ending is no picture's, or its folder cannot be made.
    """
    if path.suffix not in SUFFIXES:
        raise AnalysisError(f"--out {path}: expected a picture that ends in {', '.join(SUFFIXES)}")
    folder(path.parent)
    return path


def write(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        AnalysisError: it cannot be written.
    """
    try:
        replace(path, content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise AnalysisError(f"{path}: cannot be written: {error.strerror or error}") from None


def draw(figure: Figure, path: Path) -> None:
    """Write a figure, the same bytes for the same figure."""
    import matplotlib

    memory = io.BytesIO()
    undated = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with matplotlib.rc_context({"svg.hashsalt": "fastpeft"}):
        figure.savefig(memory, format=path.suffix[1:], dpi=_DPI, metadata=undated[path.suffix])
    write(path, memory.getvalue())
