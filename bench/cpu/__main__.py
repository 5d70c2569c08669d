"""The CPU engine's training steps: against their matrix products, against peers, in time and memory; goals last.

    python -m bench.cpu                   # adds the rows that are missing, prints all tables
    python -m bench.cpu --breakdown       # where the time of a step goes, operator by operator
    python -m bench.cpu --write-docs      # docs/performance.md from the committed results

Rows go to bench/results/<device>/cpu.json one by one; the same command again continues. A row is measured only while
nobody else computes on the machine.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.cpu import tables
from bench.cpu.breakdown import breakdown_rows, breakdown_table
from bench.cpu.rows import Settings, rows
from bench.cpu.shapes import Models
from bench.device_parts.rows import outcome
from bench.record import Record, default_path
from bench.tables.errors import TableError
from fastpeft._serve import GOES_ON, serve


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing and print the tables; 1 if a row failed or is missing."""
    given = _parser().parse_args(argv)
    return serve(lambda: _serve(given), GOES_ON)


def _serve(given: argparse.Namespace) -> int:
    if given.write_docs or given.markdown:
        part = tables.rendered(tables.committed())
        if given.markdown:
            print(part)
        else:
            tables.DOCUMENT.write_text(tables.rewritten(tables.DOCUMENT.read_text(), part))
        return 0
    if given.tiny and given.out is None:
        raise TableError("--tiny says nothing about this machine; give --out")
    record = Record(given.out or default_path("cpu").with_name("cpu.json"), "cpu")
    if any(row.get("tiny", False) != given.tiny for part in record.parts.values() for row in part.values()):
        raise TableError(f"{record.path} holds rows in little, or this run is one; give another --out")
    failed = 0 if given.table else _measure(given, record)
    if given.breakdown:
        print(breakdown_table(record.rows("breakdown")))
    else:
        print(tables.report(record.parts))
    if given.tiny:
        print("in little: none of these figures says anything")
    print(f"results: {record.path}")
    return int(failed > 0)


def _measure(given: argparse.Namespace, record: Record) -> int:
    """Run what is missing; how many rows failed."""
    settings = Settings(given.tiny, given.turns, given.seconds, given.wait, given.busy)
    models = Models()
    made = breakdown_rows(settings, models) if given.breakdown else rows(settings, models)
    wanted = [row for row in made if fnmatch.fnmatch(f"{row[0]}/{row[1]}", given.only)]
    missing = [row for row in wanted if given.again or not record.done(row[0], row[1])]
    failed = 0
    for count, (part, key, run) in enumerate(missing, 1):
        print(f"[{count}/{len(missing)}] {part}/{key}", flush=True)
        try:
            row = outcome(run, trace=True)
        except KeyboardInterrupt:
            print("stopped; the same command continues")
            return 1
        if reason := row.get("error") or row.get("unavailable"):
            failed += 1
            print(f"    {reason}", flush=True)
            if record.done(part, key):
                continue
        record.add(part, key, {**row, **({"tiny": True} if given.tiny else {})})
    return failed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="result file; default bench/results/<device>/cpu.json")
    parser.add_argument("--only", default="*", help="rows whose part/key fits this pattern, as 'steps/*/b16/*'")
    parser.add_argument("--again", action="store_true", help="measure rows that the file already holds")
    parser.add_argument("--breakdown", action="store_true", help="time of every native call of a step instead")
    parser.add_argument("--turns", type=int, help="rounds of each row; default as many as fit into --seconds")
    parser.add_argument("--seconds", type=float, default=30.0, help="after which no further round of a row begins")
    parser.add_argument("--wait", type=float, default=60.0, help="seconds to wait until others are idle")
    parser.add_argument("--busy", action="store_true", help="measure although others compute; says little")
    parser.add_argument("--tiny", action="store_true", help="two narrow blocks, to try the program out; needs --out")
    parser.add_argument("--table", action="store_true", help="measure nothing, print what the file holds")
    parser.add_argument("--markdown", action="store_true", help="print the committed results as in the documentation")
    parser.add_argument("--write-docs", action="store_true", help="put them into docs/performance.md")
    return parser


if __name__ == "__main__":
    sys.exit(main())
