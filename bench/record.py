"""One result file a device, filled row by row over as many runs as it takes.

{"runs": [environment of each run], "parts": {part: {row: {..., "run": index into runs}}}}
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from bench.timing import device_name, environment

RESULTS = Path(__file__).resolve().parent / "results"


def default_path(device: torch.device | str) -> Path:
    """Return the place of a device's results: bench/results/<device>/device.json."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return RESULTS / slug / "device.json"


class Record:
    """The result file: which rows are there, and adding one, written at once and atomically.

    Args:
        path: The file; it may exist, then rows are added to it.
        device: What the rows of this run are measured on.
    """

    def __init__(self, path: Path, device: torch.device | str) -> None:
        self.path = path
        self._environment = environment(device)
        self._data = {"runs": [], "parts": {}}
        if path.exists():
            self._data = json.loads(path.read_text())
            other = {run["device"] for run in self._data["runs"]} - {self._environment["device"]}
            if other:
                raise ValueError(f"{path} holds results of {', '.join(sorted(other))}, not of this device; give --out")
        self._run: int | None = None

    def rows(self, part: str) -> dict[str, dict]:
        """Return the rows of a part by key."""
        return self._data["parts"].get(part, {})

    def done(self, part: str, key: str) -> bool:
        """Tell whether a row is there and needs no second try."""
        row = self.rows(part).get(key)
        return row is not None and not {"error", "unavailable"} & row.keys()

    @property
    def parts(self) -> dict[str, dict[str, dict]]:
        """All rows, by part and key."""
        return self._data["parts"]

    def add(self, part: str, key: str, row: Mapping[str, object]) -> None:
        """Add or replace a row, noting the run it is from."""
        if self._run is None:
            self._data["runs"].append(self._environment)
            self._run = len(self._data["runs"]) - 1
        self._data["parts"].setdefault(part, {})[key] = {**row, "run": self._run}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".tmp")
        draft.write_text(json.dumps(self._data, indent=1) + "\n")
        os.replace(draft, self.path)
