"""Eight methods on four tasks with a pretrained backbone, on a computer without a network.

    python -m bench.offline --data shared/vtab-1k --out bench/results/offline
    python -m bench.offline ... --minutes 60      # begin no run after an hour; the same command goes on from there
    python -m bench.offline ... --tabulate        # no runs: the tables of what is there

Every method's two learning rates are trained on 800 images and scored on 200, the better of them is trained on both
with three seeds and tested. Runs are kept in DIR/results.csv and never done twice. `--data` holds the task folders
`cifar` (with train_pool10k.tar for the data scales) and `dtd10`, or one of them; MNIST-1k and dSprites are made here.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from bench.figures import catalogue
from bench.offline import data, plan, tables
from bench.offline.run import ShortJob
from bench.tables import study
from bench.tables.errors import TableError, unknown
from bench.tables.protocol import Row, best
from bench.tables.results import Results
from fastpeft._serve import GOES_ON, serve
from fastpeft.trainer.feature_store import DEFAULT_LIMIT, FeatureStore
from fastpeft.trainer.report import Reporter

SEARCH_SEED = 0


class _OutOfTimeError(Exception):
    """The minutes that were given are over."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0, or 2 for a request that cannot be served."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.offline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of the given task folders")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results.csv, tables and figures")
    parser.add_argument(
        "--work", type=Path, default=Path("out/offline"), metavar="DIR", help="made images, checkpoints [out/offline]"
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help=f"in this order: {', '.join(plan.PARTS)}; all")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help=f"{', '.join(plan.ROWS)}; all")
    parser.add_argument("--minutes", type=float, metavar="N", help="begin no further run after so many")
    parser.add_argument("--tabulate", action="store_true", help="no runs: the tables of the results that are there")
    options = parser.parse_args(arguments)
    return serve(lambda: _serve(options), GOES_ON)


def _serve(options: argparse.Namespace) -> None:
    for name in options.tasks or ():
        if name not in plan.PARTS:
            raise unknown("task", name, plan.PARTS)
    for name in options.methods or ():
        if name not in plan.ROWS:
            raise unknown("method", name, plan.ROWS)
    if options.minutes is not None and options.minutes <= 0:
        raise TableError(f"--minutes: expected a positive number, got {options.minutes:g}")
    results = Results(options.out / "results.csv")
    say = Reporter(True)
    if not options.tabulate:
        end = None if options.minutes is None else time.monotonic() + 60 * options.minutes
        roots, missing = data.prepare(options.data, options.work)
        for line in missing:
            say.say(f"left out  {line}")
        try:
            parts = [plan.PARTS[name] for name in options.tasks or plan.PARTS]
            _run(options, [part for part in parts if part.folder in roots], roots, results, end, say)
        except _OutOfTimeError:
            say.say(f"{options.minutes:g} minutes are over; the same command goes on from here")
    tables.write(results, options.out)
    say.say(f"tables    {options.out}; results {results.path}")
    if catalogue.write(options.out):
        say.say(f"figures   {options.out / catalogue.FOLDER}; all on one page: python -m bench.report {options.out}")


def _run(
    options: argparse.Namespace,
    parts: list[plan.Part],
    roots: dict[str, Path],
    results: Results,
    end: float | None,
    say: Reporter,
) -> None:
    """Have every run of these parts in the results.

    Raises:
        _OutOfTimeError: the time is over; what was run is kept.
    """
    store = study.storage(None, options.work)
    features = FeatureStore(options.work / "features", DEFAULT_LIMIT, say.warn)

    def run(jobs: list[ShortJob]) -> None:
        def look_at_clock() -> None:
            if end is not None and time.monotonic() > end and not all(results.has(**job.key()) for job in jobs):
                raise _OutOfTimeError

        def advance(job: ShortJob) -> None:
            found = results.find(**job.key())
            say.say(f"{job}: {float(found['accuracy']):.2%} {found['seconds']} s")
            look_at_clock()

        look_at_clock()
        study.run_all(jobs, results, options.work / "runs", store, advance, features)

    def search(part: plan.Part, row: Row) -> tuple[tuple[str, float], ...]:
        """The better setting."""
        points = [tuple(point.items()) for point in part.protocol.grid(row)]
        jobs = [_job(roots, part, row, "search", point, SEARCH_SEED) for point in points]
        run(jobs)
        scores = [(job.setting, float(results.find(**job.key())["accuracy"])) for job in jobs]
        return tuple(best(scores).items())

    for part in parts:
        searched = plan.PARTS[part.rates_of or part.task]
        for row in (plan.ROWS[name] for name in part.methods if name in (options.methods or plan.ROWS)):
            chosen = search(searched, row)
            run([_job(roots, part, row, "final", chosen, seed) for seed in part.protocol.seeds])


def _job(
    roots: dict[str, Path], part: plan.Part, row: Row, stage: str,
    point: tuple[tuple[str, float], ...], seed: int,
) -> ShortJob:  # fmt: skip
    return ShortJob(
        backbone=plan.BACKBONE, root=roots[part.folder], task=part.task, folder=part.folder, row=row,
        protocol=part.protocol, stage=stage, point=point, seed=seed,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
