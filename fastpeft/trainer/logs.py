"""TensorBoard events: loss and learning rates by step, accuracies by epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class Logs:
    """The event writer of the first rank; does nothing on the others."""

    def __init__(self, folder: Path, first_step: int, enabled: bool) -> None:
        self._writer = None
        if not enabled:
            return
        # Steps after the checkpoint were written by the run that was interrupted, and will be written again.
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def step(self, step: int, loss: float, rates: dict[str, float]) -> None:
        """Note a training step."""
        if self._writer is not None:
            self._writer.add_scalar("train/loss", loss, step)
            for name, rate in rates.items():
                self._writer.add_scalar(f"lr/{name}", rate, step)

    def epoch(self, step: int, entry: dict[str, Any]) -> None:
        """Note an epoch's history entry."""
        if self._writer is not None:
            for name, value in entry.items():
                if name != "epoch":
                    self._writer.add_scalar(f"epoch/{name}", value, step)

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()
