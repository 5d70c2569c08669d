"""Has the library become slower, or does it need more memory, than the committed results say?

    python -m bench.check            # compares a small selection with bench/results/<device>/bench.json
    python -m bench.check --write    # measures that file

What is compared are ratios to the literal implementation that ran in the same turns, so that another clock speed means
nothing. A ratio that grew by more than a tenth is measured once more, and fails only if it has grown then too.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench.cost import compare
from bench.cost.compare import ALLOWED, RATIOS, Change, Comparison, Record
from bench.cost.methods import OURS
from bench.cpu import idle
from bench.record import default_path
from bench.tables.errors import TableError
from fastpeft._serve import serve

SELECTION = ("vpt-deep-1", "vpt-deep-200", "lora-qkv-8", "prompt_attention")
_ROOT = Path(__file__).resolve().parents[1]
# At the most, and a row and phase's seconds. The second measurement decides, and so has to be as sure of itself as the
# committed one; a round of steps may take four seconds.
_TURNS, _SECONDS = 15, 10
_SURE_TURNS, _SURE_SECONDS = 30, 40

# Measures rows, with so many turns in so many seconds.
Run = Callable[[Sequence[str], int, float], list[Record]]


class BrokenError(TableError):
    """A benchmark did not end as it should."""


def run(rows: Sequence[str], turns: int, seconds: float, keep: Path | None = None, options: Sequence[str] = ()) -> list:
    """Measure rows as `pytest bench --benchmark-only` does, in a process of its own; their records.

    Args:
        rows: names.
        turns: of each variant at the most.
        seconds: of the turns of a row and phase.
        keep: where to leave the JSON file; nowhere if None.
        options: of pytest besides.

    Raises:
        BrokenError: a benchmark failed; what and why is on the terminal.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "pytest", "bench/test_cost.py", "--benchmark-only", "--bench-compile", "none"]
        command += ["--bench-rows", ",".join(rows), "--bench-turns", str(turns), "--bench-seconds", str(seconds)]
        done = subprocess.run([*command, "--benchmark-json", str(path), *options], cwd=_ROOT)
        if done.returncode != 0:
            raise BrokenError("benchmarks failed; see above")
        found = compare.load(path)
        if keep is not None:
            keep.parent.mkdir(parents=True, exist_ok=True)
            keep.write_bytes(path.read_bytes())
        return found


def check(before: Sequence[Record], run: Run, say: Callable[[str], None]) -> int:
    """Compare with what is committed.

    Args:
        before: the committed records.
        run: what measures.
        say: called with lines.

    Returns:
        0 if no ratio of ours has grown, 1 if one has, twice, or cannot be measured, 2 if the runs are not comparable.
    """
    try:
        return _check(before, run, say)
    except BrokenError as error:
        say(f"bench-check: {error}")
        return 1


def _check(before: Sequence[Record], run: Run, say: Callable[[str], None]) -> int:
    first = compare.compare(before, run(SELECTION, _TURNS, _SECONDS))
    if first.different:
        say(f"bench-check: not comparable with the committed results: {first.different}")
        return 2
    gone = sorted({f"{row} {phase}" for row, phase, who, _ in first.alone if who == OURS})
    gone += sorted(f"{RATIOS[figure]} of {key[0]} {key[1]}" for key, figure in first.without if key[2] == OURS)
    suspects = first.regressions()
    confirmed: list[Change] = []
    if suspects:
        rows = list(dict.fromkeys(change.key[0] for change in suspects))
        say(f"bench-check: {', '.join(rows)}: more than {ALLOWED:.0%} above the committed ratios; measuring once more")
        confirmed = _confirmed(suspects, compare.compare(before, run(rows, _SURE_TURNS, _SURE_SECONDS)))
    for line in compare.lines(first):
        say(line)
    for change in suspects:
        say(f"{'regressed, twice' if change in confirmed else 'not so the second time'}: {change}")
    for name in gone:
        say(f"committed, but not measured now: {name}")
    if confirmed or gone:
        return 1
    say("bench-check: no ratio has regressed")
    return 0


def _confirmed(suspects: Sequence[Change], second: Comparison) -> list[Change]:
    """Those that regressed in the second measurement too."""
    again = {(change.key, change.figure) for change in second.regressions()}
    return [change for change in suspects if (change.key, change.figure) in again]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see `check` for the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.check", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="measure what later runs are compared with")
    parser.add_argument("--against", type=Path, metavar="FILE", help="default bench/results/<device>/bench.json")
    given, options = parser.parse_known_args(arguments)
    return serve(lambda: _serve(given, options))


def _serve(given: argparse.Namespace, options: list[str]) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = given.against or default_path(device).with_name("bench.json")
    if not given.write and not path.exists():
        print(f"bench-check: nothing was compared: this machine has no committed results, {path} is not there")
        print("bench-check: `python -m bench.check --write` measures them")
        return 0
    if not torch.cuda.is_available() and (others := idle.load() or 0.0) > idle.ALLOWED:
        print(f"bench-check: other processes use {others:.2f} cores, so that ratios may be off", flush=True)
    if given.write:
        run(SELECTION, _SURE_TURNS, _SURE_SECONDS, path, options)
        print(f"bench-check: written to {path}")
        return 0
    before = compare.load(path)
    return check(before, lambda rows, turns, seconds: run(rows, turns, seconds, None, options), print)


if __name__ == "__main__":
    sys.exit(main())
