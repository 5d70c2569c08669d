"""What a row costs on this machine: time and memory of a training step and of an inference, ours and literal.

    python -m bench.tables.cost '{"method": {"name": "linear"}, "backbone": "vit_base_patch16_224", ...}'

measures one thing in a process of its own and prints one line of JSON; `measure` has all of a table measured so.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import io
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastpeft
from bench.cases import batch, build, create_model
from bench.memory import ResidentPeak, cuda_peak, in_subprocess, own_pages
from bench.tables.errors import TableError
from bench.timing import device_name, interleave
from fastpeft.trainer import launch, precision

FILE = "costs.csv"
# fastpeft and the implementation that follows the papers' equations to the letter.
IMPLEMENTATIONS = {"fastpeft": "fused", "literal": "literal"}
PHASES = ("train", "test")
CLASSES = 100
KEY = ("method", "implementation", "backbone", "image_size", "batch", "turns", "precision", "device")
VALUES = (
    "tuned_over_total", *(f"{phase}_{what}" for phase in PHASES for what in ("ms", "p20_ms", "p80_ms", "peak_mb")),
    "version", "date",
)  # fmt: skip
FIELDS = (*KEY, *VALUES)
Line = dict[str, str]


@dataclass(frozen=True)
class Case:
    """A row on a model, as it is measured.

    Attributes:
        method: fields of the method, or of the parts of a sum.
        backbone: timm name; weights are random, which makes no difference to time and memory.
        image_size: pixels.
        batch: images of a step.
        turns: of each implementation.
        precision: "fp32", "bf16", or "auto" for what the hardware is good at.
    """

    method: dict[str, Any] | list[dict[str, Any]]
    backbone: str
    image_size: int
    batch: int
    turns: int
    precision: str

    def dtype(self, device: torch.device) -> torch.dtype:
        """Of frozen weights and activations."""
        return precision.choose(self.precision, device)[0]


class Work:
    """A case built by one implementation: its training step and its inference.

    Trained tensors are fp32 masters, as the trainer has them, and frozen ones in the working format.

    Attributes:
        tuned_over_total: trained parameters in percent of the backbone's.
        resident_bytes: of model and batch.
    """

    def __init__(self, case: Case, implementation: str, device: torch.device) -> None:
        self.device, self.dtype = device, case.dtype(device)
        plain = create_model(case.backbone, CLASSES, case.image_size)
        total = sum(p.numel() for name, p in plain.named_parameters() if not name.startswith("head"))
        model = build(IMPLEMENTATIONS[implementation], fastpeft.methods.from_dict(case.method), plain).to(device)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.tuned_over_total = 100 * sum(p.numel() for p in trained) / total
        precision.cast_frozen(model, self.dtype)
        self.model: nn.Module = fastpeft.refresh(model) if implementation == "fastpeft" else model
        self.images, self.labels = batch(case.batch, case.image_size, CLASSES, torch.float32, device)
        held = (*self.model.parameters(), *self.model.buffers(), self.images)
        self.resident_bytes = sum(tensor.numel() * tensor.element_size() for tensor in held)
        self._optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step(self, phase: str) -> Callable[[], Tensor]:
        """A training step, or an inference."""
        return self._train if phase == "train" else self._test

    def _train(self) -> Tensor:
        self.model.train()
        with precision.autocast(self.device, self.dtype):
            logits = self.model(self.images)
        loss = nn.functional.cross_entropy(logits.float(), self.labels)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @torch.no_grad()
    def _test(self) -> Tensor:
        self.model.eval()
        with precision.autocast(self.device, self.dtype):
            return self.model(self.images)


def times(case: Case) -> dict[str, dict[str, float]]:
    """Milliseconds of a batch by implementation: the implementations take turns."""
    device = launch.find_ranks().device
    works = {name: Work(case, name, device) for name in IMPLEMENTATIONS}
    found = {name: {"tuned_over_total": work.tuned_over_total} for name, work in works.items()}
    for phase in PHASES:
        steps = {name: work.step(phase) for name, work in works.items()}
        for name, timing in interleave(steps, device=device, turns=case.turns).items():
            values = timing.to_dict()
            found[name] |= {f"{phase}_{key}": values[of] for key, of in _TIMES.items()}
    return found


_TIMES = {"ms": "median_ms", "p20_ms": "p20_ms", "p80_ms": "p80_ms"}


def peak(case: Case, implementation: str, phase: str) -> float:
    """Megabytes that a phase needs at most, model and batch included; of a process that did nothing else before."""
    device = launch.find_ranks().device
    work = Work(case, implementation, device)
    step = work.step(phase)

    def run() -> None:
        for _ in range(2):  # the second training step meets the optimizer's state
            step()

    if device.type == "cuda":
        beyond = cuda_peak(run, device)
    else:
        with ResidentPeak() as resident:
            run()
        beyond = resident.bytes
    return (beyond + work.resident_bytes) / 2**20


def lines(path: Path) -> list[Line]:
    """What was measured, in the order in which it came.

    Raises:
        TableError: the file is not one of these.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    # A process that was killed may have left the beginning of a line behind.
    whole = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(whole, newline=""))
    if whole and tuple(reader.fieldnames or ()) != FIELDS:
        raise TableError(f"{path}: its columns are not those of a file of costs: {','.join(FIELDS)}")
    found = list(reader)
    for number, line in enumerate(found, start=2):
        if None in line or None in line.values():
            raise TableError(f"{path}:{number}: expected {len(FIELDS)} fields; repair or remove the line")
    return found


def measure(name: str, case: Case, path: Path, say: Callable[[str], None]) -> None:
    """Have a row measured that is not in the file yet.

    Raises:
        TableError: a measurement failed, for one for want of memory, or the file cannot be written.
    """
    keys = {implementation: key_of(name, implementation, case) for implementation in IMPLEMENTATIONS}
    there = lines(path)
    if all(find(there, key) is not None for key in keys.values()):
        return
    say(f"{name}: times and memory of {case.batch} images, {' and '.join(IMPLEMENTATIONS)}")
    found = _ask(case, "times")
    about = {"version": fastpeft.__version__, "date": datetime.date.today().isoformat()}
    for implementation, key in keys.items():
        values = {field: f"{value:.4f}" for field, value in found[implementation].items()}
        for phase in PHASES:
            values[f"{phase}_peak_mb"] = f"{_ask(case, 'peak', implementation, phase):.1f}"
        if find(there, key) is None:
            _append(path, key | values | about)


def key_of(name: str, implementation: str, case: Case) -> dict[str, str]:
    """What a row is found by; the device is part of it."""
    device = launch.find_ranks().device
    working = str(case.dtype(device)).removeprefix("torch.")
    where = {"backbone": case.backbone, "image_size": case.image_size, "batch": case.batch, "turns": case.turns}
    key = {"method": name, "implementation": implementation, **where, "precision": working}
    return {field: str(value) for field, value in (key | {"device": device_name(device)}).items()}


def find(found: list[Line], key: Mapping[str, str]) -> Line | None:
    """The first line with these fields."""
    return next((line for line in found if all(line[field] == value for field, value in key.items())), None)


def _ask(case: Case, *what: str) -> Any:
    try:
        return in_subprocess("bench.tables.cost", json.dumps(asdict(case)), *what)["found"]
    except RuntimeError as error:
        raise TableError(f"a measurement failed: {str(error).strip().splitlines()[-1]}") from error


def _append(path: Path, line: Mapping[str, str]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.seek(0)
            end = file.read().rfind(b"\n") + 1
            file.truncate(end)
            if not end:
                writer.writeheader()
            writer.writerow(line)
            try:
                file.write(text.getvalue().encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
    except OSError as error:
        raise TableError(f"{path}: cannot be written: {error.strerror or error}; nothing was lost") from error


def main(arguments: list[str]) -> None:
    """Measure one thing of one case."""
    case, what = Case(**json.loads(arguments[0])), arguments[1]
    with contextlib.redirect_stdout(sys.stderr):
        if what == "times":
            found = times(case)
        else:
            own_pages()
            found = peak(case, *arguments[2:])
    print(json.dumps({"found": found}))


if __name__ == "__main__":
    main(sys.argv[1:])
