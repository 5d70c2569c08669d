"""The end of a run: numbers as JSON, curves as a picture, a table for the reader."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch
import torch.distributed

# The object and not pyplot, which keeps global state and looks for a display. Imported here so that a run without
# matplotlib ends before it starts.
from matplotlib.figure import Figure

from fastpeft.trainer import memory

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
    """The largest memory of any rank since `memory.forget_peak`: resident on the host, allocated on the device.

    Collective. The host's is of all that the process held meanwhile, not of the run alone.
    """
    host = memory.peak_resident() / 2**20
    on_device = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else 0.0
    both = torch.tensor([host, on_device], dtype=torch.float64, device=device)
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
    found = {"host": round(float(both[0]), 1)}
    if device.type == "cuda":
        found["device"] = round(float(both[1]), 1)
    return found


def rows(results: dict[str, Any]) -> dict[str, str]:
    """The table of a finished run."""
    metric = results.get("metric", "accuracy")
    test, last = results[f"test_{metric}"], results["history"][-1]
    table = {
        "method": results["method"],
        "trained parameters": f"{results['trained_parameters']:,} ({results['trained_share']:.2%} of all)",
    }
    # Of a run by the step the parts are known by their last steps.
    unit = "step" if "step" in last else "epoch"
    name = f"test {metric.replace('_', ' ')}"
    if test["last"] is not None:
        table[name] = f"{shown(metric, test['last'])} at the last {unit}"
    at = results["history"][results["selected_epoch"] - 1][unit]
    if test.get("best_val") is not None:
        table[f"{name}, selected"] = f"{shown(metric, test['best_val'])} at {unit} {at}, the best on validation"
    elif test["last"] is None and f"val_{metric}" in results["history"][results["selected_epoch"] - 1]:
        score = results["history"][results["selected_epoch"] - 1][f"val_{metric}"]
        table[f"validation {metric.replace('_', ' ')}"] = f"{shown(metric, score)} at {unit} {at}"
    table["training"] = f"{results['seconds']['train']:.0f} s, {results['ms_per_image']:.2f} ms per image"
    table["whole run"] = f"{results['seconds']['total']:.0f} s"
    table["peak memory"] = ", ".join(f"{value:,.0f} MB {where}" for where, value in results["peak_memory_mb"].items())
    table["precision"] = results["precision"]
    return table


def shown(metric: str, score: float) -> str:
    """A score for the reader: accuracies in percent, those of captions times 100, as papers give them."""
    return f"{score:.2%}" if metric == "accuracy" else f"{100 * score:.1f}"


def draw(history: list[dict[str, Any]], path: Path, metric: str = "accuracy") -> None:
    """Plot loss and score by epoch, or by step where the history says which."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    unit = "step" if "step" in history[-1] else "epoch"
    left.plot([entry[unit] for entry in history], [entry["train_loss"] for entry in history], marker=".", label="train")
    for split in ("val", "test"):
        for axis, name, factor in ((left, f"{split}_loss", 1), (right, f"{split}_{metric}", 100)):
            seen = [entry for entry in history if entry.get(name) is not None]
            if seen:
                values = [factor * entry[name] for entry in seen]
                axis.plot([entry[unit] for entry in seen], values, marker=".", label=split)
    left.set(xlabel=unit, ylabel="cross-entropy", yscale="log")
    right.set(xlabel=unit, ylabel="top-1 accuracy, %" if metric == "accuracy" else f"{metric}, x 100")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, dpi=120, format="png")
    unfinished.replace(path)
