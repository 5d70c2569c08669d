"""What a training run gains: against a linear probe in accuracy, against the literal implementation in time and memory.

    python -m bench.compare [OUT_DIR]

OUT_DIR is the output folder of a finished training run. The linear probe is trained on the same images, on features
computed once. Fused and literal training steps take turns; each memory figure is from a process of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bench.cases import token_rows
from bench.memory import in_subprocess, own_pages
from bench.paths import PATHS, Setting
from bench.timing import Timing, environment, floor, interleave
from fastpeft._serve import serve
from fastpeft.config import Config
from fastpeft.errors import FastPEFTError
from fastpeft.trainer import checkpoint, launch, results, session
from fastpeft.trainer.report import Reporter

_ROOT = Path(__file__).resolve().parents[1]
_QUICKSTART = _ROOT / "configs" / "quickstart.yaml"
_PROBE_EPOCHS = 50
_LITERAL_IS = "the same step unfused, every row through every block"
_MEMORY_IS = "peak resident memory of two training steps less that of the process with model and batch loaded"
_CUDA_MEMORY_IS = "peak memory allocated during two training steps less that of the loaded model and batch"


class CompareError(FastPEFTError):
    """The folder does not hold a finished run; one line that says so."""


def main(argv: list[str] | None = None) -> int:
    """Compare, print one table, write `compare.json`; 2 if there is nothing to compare."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, help="output folder of the trainer; default: the quick start's")
    parser.add_argument("--turns", type=int, default=20, help="timed training steps of each path")
    parser.add_argument("--budget", type=float, default=7, help="seconds after which no further turn starts")
    parser.add_argument("--measure-memory", choices=PATHS, help=argparse.SUPPRESS)
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    return serve(lambda: _serve(arguments))


def _serve(arguments: argparse.Namespace) -> None:
    out = arguments.out or _quickstart_folder()
    run = _finished(out)
    torch.set_num_threads(run["threads"])
    if arguments.measure_memory:
        own_pages()
        config = _probe_config(run, out) if arguments.probe else Config.model_validate(run["config"])
        setting = Setting.of(config, str(out))
        print(json.dumps({"peak_bytes": setting.peak_memory(arguments.measure_memory)}))
        return
    compare(out, run, arguments.turns, arguments.budget)


def compare(out: Path, run: dict[str, Any], turns: int, budget: float) -> dict[str, Any]:
    """Train the probe, measure both methods on both paths, and report."""
    report = Reporter(True)
    report.say("probe     a linear head on the same images, their features computed once")
    probe = _train_probe(run, out)
    rows = {}
    configs = {"linear probe": _probe_config(run, out), _label(run): Config.model_validate(run["config"])}
    for name, config in configs.items():
        report.say(f"timing    {name}")
        outcome = probe if name == "linear probe" else run
        with report.bar(f"timing {name}", turns) as advance:
            share = budget / 4 if outcome is probe else budget  # a figure on cached features needs few turns
            rows[name] = {**_accuracy(outcome), **_times(config, out, turns, share, lambda turn: advance(1))}
    report.say("memory    of each, in a process of its own")
    with report.bar("measuring memory", len(rows) * len(PATHS)) as advance:
        for name, path, peak in _memories(out, list(rows)):
            rows[name]["paths"][path]["peak_bytes"] = peak
            advance(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    outcome = {
        "environment": environment(device),
        "run": str(out),
        "precision": run["precision"],
        "batch_size": run["config"]["train"]["batch_size"],
        "memory": _CUDA_MEMORY_IS if device.type == "cuda" else _MEMORY_IS,
        "rows": rows,
    }
    checkpoint.write_text(out / "compare.json", json.dumps(outcome, indent=1))
    if not (out / "curves.png").exists():
        results.draw(run["history"], out / "curves.png")
    example = _example(Config.model_validate(run["config"]), out)
    Console(highlight=False).print(table(outcome))
    _say_next(report, out, example)
    return outcome


def _quickstart_folder() -> Path:
    from fastpeft.config import load_config

    return Path(load_config(_QUICKSTART).out)


def _finished(out: Path) -> dict[str, Any]:
    try:
        run = json.loads((out / "results.json").read_text())
    except (OSError, ValueError):
        raise CompareError(
            f"{out} holds no finished run; train one with `deepspeed fastpeft/train.py --config ... out={out}`"
        ) from None
    if not (out / "adapter").is_dir():
        raise CompareError(f"{out} holds results but no adapter; train again with --fresh")
    return run


def _probe_config(run: dict[str, Any], out: Path) -> Config:
    """Only the head trained, for at least fifty epochs: on cached features they cost seconds."""
    tree = json.loads(json.dumps(run["config"]))
    train = tree["train"]
    if "head" in train["lr"]:
        train["lr"] = {"head": train["lr"]["head"]}
    elif train["base_lr"] is not None:
        train["lr"] = {}
    train |= {"epochs": max(_PROBE_EPOCHS, train["epochs"]), "eval_every": 0}
    train |= {"checkpoint_every": f"{train['epochs']} epochs", "cache_features": "auto"}
    return Config.model_validate({**tree, "method": {"name": "linear"}, "out": str(out / "linear_probe")})


class _Quiet(Reporter):
    """Bars and warnings only: the probe's lines and table would hide the one table that matters."""

    def say(self, text: str) -> None:
        """Say nothing."""

    def table(self, rows: dict[str, str], title: str) -> None:
        """Show nothing."""


def _train_probe(run: dict[str, Any], out: Path) -> dict[str, Any]:
    """Train the linear probe as the trainer would, or find it trained already."""
    config = _probe_config(run, out)
    try:
        other = json.loads((Path(config.out) / "results.json").read_text())["config"] != config.model_dump(mode="json")
    except (OSError, ValueError):
        other = True
    outcome = session.run(config, str(out), other, _Quiet(True), launch.find_ranks())
    launch.stop()
    return outcome


def _label(run: dict[str, Any]) -> str:
    """Name the run's method for the table."""
    parts = run["config"]["method"]
    names = []
    for part in parts if isinstance(parts, list) else [parts]:
        name = str(part["name"])
        if name == "vpt":
            name = f"VPT-{'Deep' if part.get('deep', True) else 'Shallow'}, {part['length']} prompts"
        names.append(name)
    return " + ".join(names)


def _accuracy(outcome: dict[str, Any]) -> dict[str, Any]:
    test = outcome["test_accuracy"]
    best = test.get("best_val")
    return {
        "trained_parameters": outcome["trained_parameters"],
        "trained_share": outcome["trained_share"],
        "test_accuracy": best if best is not None else test["last"],
        "cached_features": outcome["cached_features"],
    }


def _times(config: Config, out: Path, turns: int, budget: float, on_turn: Any) -> dict[str, Any]:
    """Milliseconds an image of a training step on both paths and of the matrix products alone, taking turns."""
    setting = Setting.of(config, str(out))
    models = {path: setting.model(path) for path in PATHS}
    steps = {path: setting.step(path, model) for path, model in models.items()}
    count = len(setting.images)
    products = floor(models["literal"], token_rows(models["literal"], count), setting.dtype)
    timings = interleave(
        {**steps, "floor": products}, device=setting.device, turns=turns, warmup=1, budget=budget, on_turn=on_turn
    )
    bottom: Timing = timings.pop("floor")
    return {
        "floor": bottom.to_dict(per=count),
        "paths": {
            path: {**timing.to_dict(per=count), "fraction_of_floor": bottom.median / timing.median}
            for path, timing in timings.items()
        },
        "literal_over_fused": timings["literal"].median / timings["fused"].median,
    }


def _memories(out: Path, names: list[str]) -> Iterator[tuple[str, str, int]]:
    """Measure each method on each path in a process of its own, two at a time."""
    wanted = [(name, path) for name in names for path in PATHS]

    def measure(item: tuple[str, str]) -> int:
        name, path = item
        probe = ["--probe"] if name == "linear probe" else []
        found = in_subprocess("bench.compare", str(out), "--measure-memory", path, *probe)
        return int(found["peak_bytes"])

    # On a GPU one after the other: they would share its memory, and its allocator's state with nobody.
    with ThreadPoolExecutor(1 if torch.cuda.is_available() else 2) as pool:
        for (name, path), peak in zip(wanted, pool.map(measure, wanted), strict=True):
            yield name, path, peak


def table(outcome: dict[str, Any]) -> Table:
    """Lay out the comparison, one block of lines a method; it fits into 80 columns."""
    title = f"training steps of {outcome['batch_size']} images, {outcome['precision']}"
    found = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption_justify="left")
    for heading in ("", "trained", "test", "", "ms/image", "20-80%", "of floor", "MiB"):
        found.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, row in outcome["rows"].items():
        lines = [
            (
                "cached" if path == "fused" and row["cached_features"] else path,
                _milliseconds(figures["median_ms"]),
                f"{_milliseconds(figures['p20_ms'])}-{_milliseconds(figures['p80_ms'])}",
                "" if path == "fused" and row["cached_features"] else f"{figures['fraction_of_floor']:.0%}",
                f"{figures['peak_bytes'] / 2**20:,.0f}",
            )
            for path, figures in row["paths"].items()
        ]
        lines.append(("floor", _milliseconds(row["floor"]["median_ms"]), "", "", ""))
        found.add_row(
            name.replace(", ", "\n"),
            f"{row['trained_parameters']:,}\n{row['trained_share']:.2%}",
            f"{row['test_accuracy']:.2%}",
            *("\n".join(column) for column in zip(*lines, strict=True)),
            end_section=True,
        )
    found.caption = (
        f"cached: the frozen backbone's features were computed once and are read.  literal: {_LITERAL_IS}.  "
        f"floor: the step's unavoidable matrix products alone, timed in the same turns.  MiB: {outcome['memory']}."
    )
    return found


def _milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _example(config: Config, out: Path) -> Path:
    """Save the first test image, so that there is something to predict."""
    from PIL import Image

    from fastpeft.data import open_splits
    from fastpeft.models.build import default_mean_std

    mean, std = default_mean_std(config.model.name)
    splits = open_splits(config.data, config.model.image_size, config.model.mean or mean, config.model.std or std)
    path = out / f"example-{splits.class_names[splits.test.labels[0]]}.png"
    Image.fromarray(splits.test.source.read(0)).save(path)
    return path


def _say_next(report: Reporter, out: Path, example: Path) -> None:
    report.say(f"adapter   {out / 'adapter'}")
    report.say(f"numbers   {out / 'compare.json'}, curves {out / 'curves.png'}")
    report.say(f"next      python -m fastpeft.predict {out / 'adapter'} {example}")


if __name__ == "__main__":
    sys.exit(main())
