"""Training steps of mPLUG-base with each of the study's methods: the library against the literal implementation.

    python -m bench.mplug_cost                                # adds the rows that are missing, prints all tables
    python -m bench.mplug_cost --methods lora --tasks vqa     # some of them
    python -m bench.mplug_cost --write-docs                   # docs/performance.md from the committed results

A step is forward, loss, backward and AdamW, in bf16 at batch 8, on random weights and texts of the tasks' lengths, with
dropout off; F, literal and ours take turns. Before that both have to have the same loss and gradients. Rows go to
bench/results/<device>/mplug.json one by one; the same command again continues. A row is measured only while nobody else
computes on the machine.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import generated
from bench.cpu.rows import Settings
from bench.device_parts.rows import outcome
from bench.mplug_cost import tables
from bench.mplug_cost.cases import DTYPES, IMAGES, METHODS, TASKS, cases
from bench.mplug_cost.rows import PARTS, rows
from bench.record import Record, default_path
from bench.tables.errors import TableError
from fastpeft._serve import GOES_ON, serve


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing and print the tables; 1 if a row failed, 2 for a request that cannot be served."""
    given = _parser().parse_args(argv)
    return serve(lambda: int(_serve(given) > 0), GOES_ON)


def _serve(given: argparse.Namespace) -> int:
    if given.write_docs or given.markdown:
        part = tables.rendered(generated.committed(tables.FILE))
        if given.markdown:
            print(part)
        else:
            page = generated.PERFORMANCE
            page.write_text(tables.SECTION.replaced(page.read_text(), part))
        return 0
    if given.tiny and given.out is None:
        raise TableError("--tiny says nothing about this machine; give --out")
    folder = given.out or default_path("cpu").parent
    try:
        record = Record(folder / tables.FILE, "cpu")
    except ValueError as error:
        raise TableError(str(error)) from None
    if any(row.get("tiny", False) != given.tiny for part in record.parts.values() for row in part.values()):
        raise TableError(f"{record.path} holds rows in little, or this run is one; give another --out")
    failed = 0 if given.table else _measure(given, record)
    print(tables.report(record.parts))
    if given.tiny:
        print("in little: none of these figures says anything")
    print(f"results: {record.path}")
    return failed


def _measure(given: argparse.Namespace, record: Record) -> int:
    """Run what is missing; how many rows failed."""
    for name in ("batch", "threads", "repeats"):
        if getattr(given, name) < 1:
            raise TableError(f"--{name} must be at least 1, not {getattr(given, name)}")
    settings = Settings(given.tiny, given.repeats, float("inf"), given.wait, given.busy)
    others = {"batch": given.batch, "dtype": given.dtype, "threads": given.threads, "tiny": given.tiny}
    wanted = rows(cases(given.methods, given.tasks, given.images, **others), settings, given.parts)
    missing = [row for row in wanted if given.again or not record.done(row[0], row[1])]
    failed = 0
    for count, (part, key, run) in enumerate(missing, 1):
        print(f"[{count}/{len(missing)}] {part}/{key}", flush=True)
        row = outcome(run, trace=True)
        if reason := row.get("error") or row.get("unavailable"):
            failed += 1
            print(f"    {reason}", flush=True)
            if record.done(part, key):
                continue
        record.add(part, key, {**row, **({"tiny": True} if given.tiny else {})})
    return failed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.mplug_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", metavar="NAME", help=f"of {', '.join(METHODS)}; default all")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help=f"of {', '.join(TASKS)}; default both")
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(IMAGES)}: the image tower's tokens are at hand, or it runs in every step; default both",
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default both")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="default 8")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default bf16")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="default 2")
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="rounds of each row; default 9")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of mplug.json; default bench/results/<device>")
    parser.add_argument("--again", action="store_true", help="measure rows that the file already holds")
    parser.add_argument("--wait", type=float, default=60.0, metavar="S", help="seconds to wait until others are idle")
    parser.add_argument("--busy", action="store_true", help="measure although others compute; says little")
    parser.add_argument("--tiny", action="store_true", help="few narrow layers, to try the program out; needs --out")
    parser.add_argument("--table", action="store_true", help="measure nothing, print what the file holds")
    parser.add_argument("--markdown", action="store_true", help="print the committed results as in the documentation")
    parser.add_argument("--write-docs", action="store_true", help="put them into docs/performance.md")
    return parser


if __name__ == "__main__":
    sys.exit(main())
