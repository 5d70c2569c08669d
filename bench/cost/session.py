"""A run of the cost table: what was asked for on the command line, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.cost import peak
from bench.cost.accuracy import Accuracies, read
from bench.cost.measure import COMPILED, EAGER, Figures, Measurements
from bench.cost.methods import PHASES
from bench.cost.selection import Row, choose
from bench.cost.settings import Settings
from fastpeft.errors import FastPEFTError

_KEY: pytest.StashKey[Session] = pytest.StashKey()
# What is compiled first, since a compiler takes a minute for a step: the rows that people ask about.
_FIRST = ("vpt-deep-200", "lora-qkv-8", "linear", "full")
COMPILE = ("auto", "all", "none")


def add_options(parser: pytest.Parser) -> None:
    """The options of `pytest bench`."""
    group = parser.getgroup("bench", "the cost table")
    group.addoption("--bench-rows", metavar="NAMES", help="rows, comma-separated, as vpt-*,mlp; default all")
    group.addoption("--bench-model", metavar="NAME", help="timm vision transformer; default vit_base_patch16_224")
    group.addoption("--bench-image-size", type=int, metavar="PIXELS", help="default the model's own")
    group.addoption(
        "--bench-batch", type=int, metavar="N", help="images of a step; default 64 on CUDA, 4 on CPUs with AMX, else 2"
    )
    group.addoption("--bench-dtype", metavar="NAME", help="bf16, fp16 or fp32; default bf16 on CUDA and with AMX")
    group.addoption("--bench-device", metavar="NAME", help="cpu or cuda; default cuda where there is one")
    group.addoption("--bench-turns", type=int, metavar="N", help="timed steps of a variant at the most; default 10")
    group.addoption(
        "--bench-seconds", type=float, metavar="S", help="of turns of a row and phase, three at least; default 4"
    )
    group.addoption(
        "--bench-compile", choices=COMPILE, default="auto", help="torch.compile: while there is time, all, none"
    )
    group.addoption("--bench-compiler", metavar="NAME", help="torch.compile's backend; default inductor")
    group.addoption(
        "--bench-minutes", type=float, default=12, metavar="M", help="after which nothing is compiled; default 12"
    )
    group.addoption("--results", type=Path, metavar="FILE", help="results.csv of bench.tables, for the accuracies")


@dataclass(frozen=True)
class _Asked:
    compile: str
    minutes: float


class Session:
    """One run.

    Attributes:
        rows: of the table.
        settings: of all of them.
        accuracies: of the methods.
        records: what benchmarks noted so far.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        settings: Settings,
        accuracies: Accuracies,
        say: Callable[[str], None],
        compile: str = "auto",
        minutes: float = float("inf"),
    ) -> None:
        self.rows, self.settings, self.accuracies = tuple(rows), settings, accuracies
        self.records: list[dict[str, Any]] = []
        self._asked = _Asked(compile, minutes)
        self._begin = time.monotonic()
        self._measurements = Measurements(settings, self._progress(say), peaks=peak.peaks)
        self._groups = len(
            {(row.name, phase, mode) for mode in (EAGER, COMPILED) for row, phase, _ in self.cells(mode)}
        )
        self._done = 0

    @classmethod
    def of(cls, config: pytest.Config) -> Session:
        """That of a run of pytest, made when it is first asked for.

        Raises:
            pytest.UsageError: the command line asks for what cannot be had.
        """
        if _KEY not in config.stash:
            option = config.getoption
            names = option("bench_rows")
            device = option("bench_device") or ("cuda" if torch.cuda.is_available() else "cpu")
            try:
                settings = Settings.usual(
                    device,
                    **{
                        name: option(f"bench_{name}")
                        for name in ("model", "image_size", "batch", "dtype", "turns", "seconds", "compiler")
                    },
                )
                config.stash[_KEY] = cls(
                    choose(names.split(",") if names else None),
                    settings,
                    read(option("results")),
                    lambda line: _write(config, line),
                    option("bench_compile"),
                    option("bench_minutes"),
                )
            except FastPEFTError as error:
                raise pytest.UsageError(str(error)) from None
        return config.stash[_KEY]

    @classmethod
    def begun(cls, config: pytest.Config) -> Session | None:
        """That of a run of pytest, if anything asked for it."""
        return config.stash.get(_KEY, None)

    def cells(self, mode: str) -> list[tuple[Row, str, str]]:
        """Row, phase and implementation of every benchmark, the rows that matter most to a compiler first."""
        rows = [row for row in self.rows if not row.missing]
        if mode == COMPILED:
            if self._asked.compile == "none":
                return []
            rows.sort(key=lambda row: _FIRST.index(row.name) if row.name in _FIRST else len(_FIRST))
        return [(row, phase, who) for row in rows for phase in PHASES for who in self._measurements.steps(row).who]

    def figures(self, row: Row, phase: str, who: str, mode: str) -> Figures:
        """What was measured; "unavailable" where no time was left for the compiler."""
        late = time.monotonic() - self._begin > 60 * self._asked.minutes
        if mode == COMPILED and self._asked.compile == "auto" and late:
            if not self._measurements.has(row, phase, mode):
                return {"unavailable": f"not compiled within {self._asked.minutes:g} minutes (--bench-minutes)"}
        return self._measurements.figures(row, phase, who, mode)

    def tuned_percent(self, row: Row) -> float | None:
        """Parameters trained, in percent of the model's."""
        return self._measurements.steps(row).trained_percent()

    def _progress(self, say: Callable[[str], None]) -> Callable[[str], None]:
        def counted(line: str) -> None:
            self._done += 1
            elapsed = time.monotonic() - self._begin
            left = elapsed / self._done * (self._groups - self._done)
            say(f"[{self._done}/{self._groups}, {elapsed / 60:.0f} min, {left / 60:.0f} left] {line}")

        return counted


class Replay:
    """Seconds that were measured, as a clock and the function that it times.

    Variants are timed in turns, which a benchmark's own loop cannot do; so it is given what they took.
    """

    def __init__(self) -> None:
        self._left: Iterator[float] = iter(())
        self._now = 0.0

    def of(self, seconds: Sequence[float]) -> None:
        """Replay these."""
        self._left = iter(seconds)

    def __call__(self) -> None:
        """Let the time of a turn pass."""
        self._now += next(self._left)

    def now(self) -> float:
        """Seconds on the clock."""
        return self._now


def _write(config: pytest.Config, line: str) -> None:
    """A line on the terminal, although tests' output is caught."""
    reporter = config.pluginmanager.getplugin("terminalreporter")
    capture = config.pluginmanager.getplugin("capturemanager")
    if reporter is None or config.getoption("verbose") < 0:
        return
    if capture is None:
        reporter.write_line(line)
        return
    with capture.global_and_fixture_disabled():
        reporter.ensure_newline()
        reporter.write_line(line)
