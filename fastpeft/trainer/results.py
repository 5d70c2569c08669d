"""The end of a run: numbers as JSON, curves as a picture, a table for the reader."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed

# The object and not pyplot, which keeps global state and looks for a display. Imported here so that a run without
# matplotlib ends before it starts.
from matplotlib.figure import Figure

_PACKAGES = ("torch", "timm", "deepspeed", "numpy")


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def peak_memory_mb(device: torch.device) -> dict[str, float]:
    """The largest memory of any rank so far: resident on the host, allocated on the device; collective."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    host = peak / 2**20 if sys.platform == "darwin" else peak / 2**10
    on_device = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
    both = torch.tensor([host, on_device], dtype=torch.float64, device=device)
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
    memory = {"host": round(float(both[0]), 1)}
    if device.type == "cuda":
        memory["device"] = round(float(both[1]), 1)
    return memory


def rows(results: dict[str, Any]) -> dict[str, str]:
    """The table of a finished run."""
    test = results["test_accuracy"]
    table = {
        "method": results["method"],
        "trained parameters": f"{results['trained_parameters']:,} ({results['trained_share']:.2%} of all)",
        "test accuracy": f"{test['last']:.2%} at the last epoch",
    }
    if test.get("best_val") is not None:
        table["test accuracy, selected"] = (
            f"{test['best_val']:.2%} at epoch {results['selected_epoch']}, the best on validation"
        )
    table["training"] = f"{results['seconds']['train']:.0f} s, {results['ms_per_image']:.2f} ms per image"
    table["whole run"] = f"{results['seconds']['total']:.0f} s"
    table["peak memory"] = ", ".join(f"{value:,.0f} MB {where}" for where, value in results["peak_memory_mb"].items())
    table["precision"] = results["precision"]
    return table


def draw(history: list[dict[str, Any]], path: Path) -> None:
    """Plot loss and accuracy by epoch."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [entry["epoch"] for entry in history]
    left.plot(epochs, [entry["train_loss"] for entry in history], marker=".", label="train")
    for split in ("val", "test"):
        seen = [entry for entry in history if f"{split}_accuracy" in entry]
        if seen:
            at = [entry["epoch"] for entry in seen]
            left.plot(at, [entry[f"{split}_loss"] for entry in seen], marker=".", label=split)
            right.plot(at, [100 * entry[f"{split}_accuracy"] for entry in seen], marker=".", label=split)
    left.set(xlabel="epoch", ylabel="cross-entropy", yscale="log")
    right.set(xlabel="epoch", ylabel="top-1 accuracy, %")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend()
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, dpi=120, format="png")
    unfinished.replace(path)
