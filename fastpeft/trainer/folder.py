"""The output folder: whose it is, what run it belongs to, and what it holds."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from pathlib import Path
from typing import Any

from fastpeft.config import NOT_OF_THE_RESULT, ConfigError, RunConfig
from fastpeft.errors import FastPEFTError
from fastpeft.trainer import checkpoint


class FolderBusyError(FastPEFTError):
    """Another process is training into the folder."""


class RunFolder:
    """Paths of a run, and the lock that keeps two processes from writing them at once.

    Attributes:
        root: The folder itself.
        checkpoints: Positions to resume from.
        adapter: The result.
        results: Its numbers; there only once the run is finished.
        logs: TensorBoard's events.
        plot: Loss and score.
        predictions: What the model said of the evaluated samples, where that is text.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.checkpoints = self.root / "checkpoints"
        self.adapter = self.root / "adapter"
        self.results = self.root / "results.json"
        self.logs = self.root / "tensorboard"
        self.plot = self.root / "curves.png"
        self.predictions = self.root / "predictions"
        self._config = self.root / "config.json"
        self._lock = None

    def take(self, patience: float = 10.0) -> None:
        """Lock the folder, waiting a little for the ranks of a killed run to end.

        Raises:
            FolderBusyError: Another run holds it.
            ConfigError: It cannot be made.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.root / ".lock", "w")
        except OSError as error:
            raise ConfigError(f"out: {self.root} cannot be written: {error.strerror or error}") from None
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise FolderBusyError(f"out: another run is training into {self.root}") from None
                time.sleep(0.2)

    def release(self) -> None:
        """Let the next run have the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def clear(self) -> None:
        """Remove what an earlier run left, and nothing else."""
        for path in (self.checkpoints, self.adapter, self.logs, self.predictions):
            shutil.rmtree(path, ignore_errors=True)
        for path in (self.results, self.plot, self._config):
            path.unlink(missing_ok=True)

    def claim(self, config: RunConfig) -> None:
        """Note whose folder it is, or check that it is this run's. A run that left nothing to continue holds no claim.

        Raises:
            ConfigError: It belongs to a run with another configuration; the message names the keys.
        """
        identity = config.identity()
        if not self.results.exists() and not any(self.checkpoints.glob("step-*")):
            checkpoint.write_text(self._config, json.dumps(identity, indent=1))
            return
        try:
            before = json.loads(self._config.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"out: {self.root} holds a run whose {self._config.name} cannot be read ({error}); "
                "give another out=FOLDER, or --fresh to start over"
            ) from None
        for key in NOT_OF_THE_RESULT:
            before.pop(key, None)
        # A key that is newer than the run and not given changes nothing.
        keys = sorted(key for key in before.keys() | identity.keys() if before.get(key) != identity.get(key))
        if keys:
            changes = ", ".join(f"{key} (was {before.get(key)}, now {identity.get(key)})" for key in keys)
            raise ConfigError(
                f"out: {self.root} holds a run with another configuration: {changes}; "
                "give another out=FOLDER, or --fresh to start over"
            )

    def finished(self) -> dict[str, Any] | None:
        """The results of a run that is complete, or None."""
        try:
            results = json.loads(self.results.read_text())
        except (OSError, ValueError):
            return None
        return results if self.adapter.is_dir() else None
