"""Rows in processes of their own: a kernel that crashes or hangs costs its row, and checks can run side by side.

A worker is told keys, one a line, and answers each with a row, one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench.device_parts.rows import Row, clean, crashed, outcome

_READY = {"ready": True}
# For a process that has nothing left to do.
_LAST_SECONDS = 10


def serve(rows: Sequence[Row]) -> None:
    """Be a worker: answer keys from the standard input until it ends."""
    run_of = dict(rows)
    # Libraries print; the answers have a stream of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(_READY), file=answers, flush=True)
    for line in sys.stdin:
        key = line.rstrip("\n")
        print(f"--- {key}", file=sys.stderr, flush=True)
        print(json.dumps(outcome(run_of[key], trace=True)), file=answers, flush=True)
        clean()


class Worker:
    """One process.

    Args:
        command: what starts it.
        log: file that its error stream is added to.
        limit: seconds after which a row is given up; may be changed.
        until: value of `time.perf_counter` after which every row is given up.
    """

    def __init__(self, command: Sequence[str], log: Path, limit: float, until: float = float("inf")) -> None:
        self._command, self._log = command, log
        self.limit, self.until = limit, until
        self._process: subprocess.Popen | None = None

    def __call__(self, key: str) -> dict[str, object]:
        """The row of a key; if the process ended over it, why, and the next key gets a new process."""
        process = self._running()
        try:
            process.stdin.write(f"{key}\n")
            process.stdin.flush()
            answer = self._answer(process)
        except BrokenPipeError:
            answer = None
        if answer is not None:
            if crashed(answer):
                # An illegal access, or a recording that failed, breaks whatever the process does next.
                self.close()
            return answer
        status, self._process = process.wait(), None
        return {"error": f"the process ended with status {status} before the row was done; see {self._log.name}"}

    def start(self) -> None:
        """Have the process up and ready, so that its start is not a row's time."""
        self._running()

    def close(self) -> None:
        """End the process, by itself if it will, so that it can tidy up."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(timeout=_LAST_SECONDS)
        except subprocess.TimeoutExpired:
            _kill(process)
            process.wait()

    def _running(self) -> subprocess.Popen:
        if self._process is None:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("a") as log:
                # A group of its own, since a row may have started processes that must end with it.
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    start_new_session=True,
                )
            if self._answer(self._process) != _READY:
                status, self._process = self._process.wait(), None
                raise RuntimeError(f"a worker ended with status {status} at its start; see {self._log}")
        return self._process

    def _answer(self, process: subprocess.Popen) -> dict[str, object] | None:
        late = threading.Event()

        def stop() -> None:
            late.set()
            _kill(process)

        limit = min(self.limit, max(1.0, self.until - time.perf_counter()))
        timer = threading.Timer(limit, stop)
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        if late.is_set():
            process.wait()
            self._process = None
        if line.endswith("\n"):
            return json.loads(line)
        return {"error": f"stopped after {limit:.0f} s"} if late.is_set() else None


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class Turns:
    """Hands out rows until all are done or the next one, if as slow as the slowest, would overrun the budget.

    Args:
        rows: what is to be run, in order.
        budget: seconds, counted from now.
        add: called with each key and its row.
    """

    def __init__(self, rows: Sequence[Row], budget: float, add: Callable[[str, dict], None]) -> None:
        self._rows, self._budget, self._add = rows, budget, add
        self._lock = threading.Lock()
        self._started = time.perf_counter()
        self._slowest = 0.0
        self.begun = 0

    def here(self) -> int:
        """Run rows in this process; the number of rows run."""

        def run(row: Row) -> dict[str, object]:
            try:
                return outcome(row[1])
            finally:
                clean()

        self._work(run)
        return self.begun

    def among(self, workers: Sequence[Worker]) -> int:
        """Run rows in workers, side by side; the number of rows run."""
        broken: list[BaseException] = []

        def work(worker: Worker) -> None:
            try:
                worker.start()
                self._work(lambda row: worker(row[0]))
            except BaseException as error:
                broken.append(error)

        threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in workers]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            for worker in workers:
                worker.close()
        if broken and not self.begun:
            raise broken[0]
        for error in broken:
            print(f"a process was given up: {error}", flush=True)
        return self.begun

    def _work(self, run: Callable[[Row], dict]) -> None:
        for number, row in self._next():
            begin = time.perf_counter()
            found = run(row)
            seconds = time.perf_counter() - begin
            with self._lock:
                self._slowest = max(self._slowest, seconds)
                self._add(row[0], found)
                said = found.get("error") or found.get("unavailable")
                said = said or ("FAILED" if found.get("passed") is False else "done")
                print(f"[{number}/{len(self._rows)}] {row[0]} {said} ({seconds:.1f} s)", flush=True)

    def _next(self) -> Iterator[tuple[int, Row]]:
        while True:
            with self._lock:
                late = time.perf_counter() - self._started + self._slowest > self._budget
                if self.begun == len(self._rows) or (late and self.begun):
                    return
                self.begun += 1
                number = self.begun
            yield number, self._rows[number - 1]
